"""SeiT++ (ECCV 2024, arXiv 2312.10105): masked-token pre-training and fine-tuning, TokenAdapt, ColorAdapt.

Doors: mtm_recipe (what the two programs share), models_mtm, models_mtm_finetune, token_adapt. It imports recipe and
what that needs, models_seit, token_augment, image_tokenizer and token_files.
"""
