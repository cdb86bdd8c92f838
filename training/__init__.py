"""What a training run keeps: checkpoints, its output folder, the loss, signals, and what it prints of itself.

Doors: checkpoints, run_folder, pretrained. It imports fileio and utils.
"""
