"""Files of any kind: atomic writing and locks, safe reading of what torch saved, class names, figures.

Doors: files, torch_files, labels, figures. It imports utils alone.
"""
