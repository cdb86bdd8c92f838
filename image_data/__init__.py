"""Images: where they come from, how they are decoded, batches of them, smaller copies, corruptions.

Doors: sources (any set of images), pictures (those of a command line, without labels), dataset (batches for programs),
class_subsets (what labels mean to a model), corruptions, quality (PSNR and SSIM), overlap (validation images that are
trained on), shrinking and shrunk_sets (smaller copies). It imports fileio, flags and utils.
"""
