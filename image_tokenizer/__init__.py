"""Tokenizers of images: opening one, fitting and training one, and tokenizing a set of images.

Doors: tokenizers (what a tokenizer is, and how to open one), tokenizing (a set of images), patch_fit (fit a small one
in a minute), latent_fit (a codebook for a tiny autoencoder), vq_training (train a ViT-VQGAN). It imports token_files,
image_data, training, fileio and utils.
"""
