"""Token files: the published and the compact format, the cache they are decoded to, codebooks.

Doors: token_file (reads and writes either format), cache (codes in memory), parts (a tokenizing run on disk), codebook.
Begin with token_file. published and compact hold the two formats, context_model and rans how the compact one saves a
third. foreign reads the sets of other projects, and views says which of their rows are one image. It imports fileio and
utils.
"""
