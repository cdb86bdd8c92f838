"""Files of any kind: atomic writing and locks, safe reading of what torch saved, labels and class names, figures.

Doors: files (any file), torch_files (what torch saved), labels, figures. It imports utils alone.
"""
