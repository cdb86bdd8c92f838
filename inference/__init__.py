"""Trained models, from their checkpoints alone.

Doors: models (a checkpoint's model, with its weights), pixel_models (a model of timm by its name). It imports seitpp,
models_seit, token_augment, image_data, training and utils; programs and scripts import it.
"""
