"""Images: where they come from, how they are decoded, batches of them, smaller copies, corruptions.

Doors: sources (any set of images), dataset (batches), shrinking and shrunk_sets. It imports fileio, flags and utils.
"""
