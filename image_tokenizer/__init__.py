"""Tokenizers of images: opening one, fitting and training one, and tokenizing a set of images.

Doors: tokenizers (open one), tokenizing (a set of images), patch_fit, vq_training. It imports token_files, image_data,
training, fileio and utils.
"""
