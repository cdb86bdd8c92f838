"""Trained models, from their checkpoints alone.

Doors: classifier (images to class names: one module, from a checkpoint and what lies beside it), models (a checkpoint's
model, with its weights), pixel_models (a model of timm by its name), report (what an evaluation gets wrong, as files to
look at). It imports seitpp, models_seit, image_tokenizer, image_data, token_files, token_augment, training, fileio and
utils; programs and scripts import it.
"""
