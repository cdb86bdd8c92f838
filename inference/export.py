"""A classifier as one file for other programs: torch.export's .pt2, or ONNX.

The file holds the whole way from uint8 pixels to probabilities, as `Classifier.forward` computes it, for batches of any
number of images, and the names of the classes. It is reloaded and compared with the module before it gets its name.
"""
import copy
import json
import warnings
from collections.abc import Callable
from pathlib import Path

import torch

from fileio.files import atomic_path
from image_tokenizer.vitvqgan import ViTVQGAN
from image_tokenizer.vqgan import VQGAN
from inference.classifier import Classifier
from utils import InputError, device_of, first_line

KINDS = '.pt2', '.onnx'
CLASSES, PREPARATION = 'classes', 'preparation'  # what a file holds beside the model: a JSON list, and a sentence
PT2_FILES = {CLASSES: 'classes.json', PREPARATION: 'preparation.txt'}  # their names among torch.export's extra files
BATCHES = 1, 5  # that are compared
# parts of tokenizers
DECODING = {ViTVQGAN: ('decoder', 'post_quant', 'quantizer'), VQGAN: ('decoder', 'post_quant_conv', 'codebook')}
TOLERANCE = 1e-4  # by which probabilities may differ


def check_kind(path: str | Path) -> str:
    """The kind of an export, by the ending of its name. Raises InputError for others, and where packages lack."""
    kind = Path(path).suffix.lower()
    if kind not in KINDS:
        raise InputError(f'{path}: give a name that ends in {" or ".join(KINDS)}')
    if kind == '.onnx':
        try:
            import onnx  # noqa: F401
            import onnxruntime  # noqa: F401
            import onnxscript  # noqa: F401
        except ImportError as error:
            raise InputError(f'{path}: ONNX needs packages of its own ({error}): pip install -r '
                             'requirements-export.txt') from None
    return kind


def export_classifier(classifier: Classifier, path: str | Path) -> float:
    """Write a classifier to a .pt2 or .onnx, for batches of any size.

    Returns:
        By how much a probability of the file differs from the module's, at most.

    Raises:
        InputError: for what cannot be exported, or gives other probabilities, and then there is no file.
    """
    write = {'.pt2': _write_pt2, '.onnx': _write_onnx}[check_kind(path)]
    with atomic_path(path) as temporary, torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter('ignore')  # of torch, about itself
        try:
            run = write(_without_decoder(classifier), temporary)
            differences = [_difference(classifier, run, batch) for batch in BATCHES]
        except Exception as error:  # of tracing, translating, saving and running: nearly anything
            if isinstance(error, OSError | MemoryError | InputError):
                raise
            raise InputError(f'{path}: the model cannot be exported ({type(error).__name__}: '
                             f'{first_line(error)})') from None
        difference = torch.cat(differences)
        # A feature halfway between two codes may get the other one by rounding, and then one image differs. Where the
        # export is wrong, all do.
        if not difference.median() <= TOLERANCE:
            raise InputError(f'{path}: the exported model gives other probabilities than the module: they differ by '
                             f'{difference.max().item():.2g}')
    return difference.max().item()


def _without_decoder(classifier: Classifier) -> Classifier:
    """A classifier without the weights that decode codes, which a file would hold for nothing."""
    names = DECODING.get(type(classifier.tokenizer))
    if names:
        classifier = copy.deepcopy(classifier)
        for name in names:
            setattr(classifier.tokenizer, name, None)
    return classifier


def _example(classifier: Classifier, batch: int) -> torch.Tensor:
    """Pixels (batch, 3, s, s) uint8 of noise, on the classifier's device."""
    generator = torch.Generator().manual_seed(batch)
    pixels = torch.randint(256, (batch, 3, classifier.size, classifier.size), generator=generator)
    return pixels.to(torch.uint8).to(device_of(classifier.model))


def _difference(classifier: Classifier, run: Callable, batch: int) -> torch.Tensor:
    """(batch,) largest differences of the probabilities of images."""
    pixels = _example(classifier, batch)
    return (run(pixels) - classifier(pixels).cpu()).abs().amax(1)


def _facts(classifier: Classifier) -> dict[str, str]:
    return {CLASSES: json.dumps(classifier.classes), PREPARATION: classifier.preparation}


def _tracing(classifier: Classifier) -> dict:
    """Arguments of torch's exporters."""
    # two images, since a batch of one would be traced as a constant
    return {'args': (_example(classifier, 2),), 'dynamic_shapes': {'pixels': {0: torch.export.Dim('batch')}}}


def _write_pt2(classifier: Classifier, path: str) -> Callable:
    """Write a .pt2; returns what runs it, pixels -> probabilities on the CPU."""
    program = torch.export.export(classifier, **_tracing(classifier))
    with open(path, 'wb') as file:
        torch.export.save(program, file, extra_files={PT2_FILES[key]: value for key, value in
                                                      _facts(classifier).items()})
    with open(path, 'rb') as file:
        module = torch.export.load(file).module()
    return lambda pixels: module(pixels).cpu()


def _write_onnx(classifier: Classifier, path: str) -> Callable:
    """Write an .onnx; returns what runs it, pixels -> probabilities on the CPU."""
    import onnxruntime
    program = torch.onnx.export(classifier, **_tracing(classifier), dynamo=True, verbose=False,
                                input_names=['pixels'], output_names=['probabilities'])
    program.model.metadata_props.update(_facts(classifier))
    program.save(path, external_data=False)  # all in one file
    session = onnxruntime.InferenceSession(path, providers=['CPUExecutionProvider'])
    return lambda pixels: torch.from_numpy(session.run(None, {'pixels': pixels.cpu().numpy()})[0])
