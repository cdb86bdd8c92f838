"""Class-incremental training with a replay memory: tasks, what memory holds, results.

Doors: tasks, memory, forms, task_tokens. It imports engine, token_dataset, image_tokenizer, image_data, token_files,
training, fileio, flags and utils.
"""
