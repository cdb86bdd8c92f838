"""Files of any kind: atomic writing and locks, safe reading of what torch saved, labels and class names, parquet,
figures, sizes and times of files.

Doors: files (any file), torch_files (what torch saved), labels, parquet, figures, stamps (were files replaced). It
imports utils alone.
"""
