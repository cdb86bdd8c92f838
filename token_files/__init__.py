"""Token files: the published and the compact format, the cache they are decoded to, codebooks.

Doors: token_file (any format), cache (codes in memory), parts (writing a set), codebook. It imports fileio and utils.
"""
