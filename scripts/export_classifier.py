"""Write a trained model as one file for other programs: torch.export's .pt2, or ONNX.

    python scripts/export_classifier.py output/run --output output/run/classifier.onnx

The file takes pixels (B, 3, s, s) uint8 and gives probabilities (B, classes) float32: for a model of tokens, tokenizer,
codes, codebook and ViT are all in it, and the names of the classes too. It is compared with the model before it gets
its name. How images become pixels is printed, and stands in the file. ONNX needs requirements-export.txt.
"""
import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from fileio.files import check_writable
from flags import Parser, add_classifier_flags, classifier_options
from inference.classifier import load_classifier
from inference.export import check_kind, export_classifier
from models_seit import STEMS
from utils import device_of_rank, print0, run


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line. Raises InputError."""
    parser = Parser(__doc__)
    add_classifier_flags(parser, STEMS)
    add = parser.add_group('the export')
    add('--output', required=True, metavar='FILE', help='the file to write, .pt2 or .onnx')
    parser.set_defaults(device='cpu')  # a .pt2 runs on the device on which it was made
    return parser.parse_args(argv)


def main(args: argparse.Namespace) -> None:
    """Export a classifier."""
    check_kind(args.output)
    check_writable(args.output, inputs=[args.checkpoint] if os.path.isfile(args.checkpoint) else [])
    classifier = load_classifier(args.checkpoint, device_of_rank(args.device), **classifier_options(args))
    difference = export_classifier(classifier, args.output)
    size = os.path.getsize(args.output) / 1e6
    print0(f'{args.output}: {size:.1f} MB, pixels (batch, 3, {classifier.size}, {classifier.size}) uint8 -> '
           f'probabilities (batch, {len(classifier.classes)}), which differ by {difference:.1g} at most from the '
           "model's")
    print0(f'pixels of an image: {classifier.preparation}')


if __name__ == '__main__':
    run(main, parse_args)
