"""Token files: the published and the compact format, the cache they are decoded to, codebooks.

Doors: token_file (reading and writing any format), cache (codes in memory), parts (a tokenizing run on disk), codebook.
It imports fileio and utils.
"""
