"""A perceptual term for training tokenizers: distances between features of VGG16, whose weights the user gives.

Squared errors of pixels reward blur where a texture cannot be reproduced exactly; features of a classifier do so less.
This is LPIPS (Zhang et al., 2018, arXiv 1801.03924) without its learned weights of channels.
"""
import copy
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torchvision.models.vgg import cfgs, make_layers

from fileio.torch_files import load_torch
from training.checkpoints import load_weights
from utils import InputError

STAGES = 3, 8, 15, 22  # relu1_2, relu2_2, relu3_3 and relu4_3 among VGG16's features, as LPIPS takes them
LAYERS = 13  # entries of torchvision's configuration 'D' that make the features up to the last of them
MEAN = 0.485, 0.456, 0.406  # of ImageNet's pixels in [0, 1], which VGG16 was trained on
DEVIATION = 0.229, 0.224, 0.225


class PerceptualLoss:
    """Mean squared distance of unit feature vectors at four depths of VGG16.

    It is no nn.Module, so that no checkpoint and no optimizer takes its weights for the tokenizer's.

    Args:
        path: torchvision's VGG16, as a torch file of its state dict.
        device: where images will be.

    Raises:
        InputError: for another file.
    """

    def __init__(self, path: str | Path, device: torch.device):
        weights = load_torch(path, "torchvision's VGG16")
        if not isinstance(weights, dict):
            raise InputError(f"{path}: not the state dict of torchvision's VGG16")
        network = nn.ModuleDict({'features': make_layers(cfgs['D'][:LAYERS])})
        needed = network.state_dict().keys()
        load_weights(network, {key: weights[key] for key in needed if key in weights}, str(path))
        for number, layer in enumerate(network['features']):
            if isinstance(layer, nn.ReLU):
                network['features'][number] = nn.ReLU()  # in place, it would change the features it is given
        self.layers = network['features'].eval().requires_grad_(False).to(device)
        self.mean, self.deviation = (torch.tensor(values, device=device).view(3, 1, 1) for values in (MEAN, DEVIATION))

    def __deepcopy__(self, memo: dict[int, Any]) -> 'PerceptualLoss':
        return copy.copy(self)  # the average of a model shares these weights

    def __call__(self, images: torch.Tensor, reconstruction: torch.Tensor) -> torch.Tensor:
        """The distance () of images (B, 3, H, W) in [0, 1] and reconstructions of the same shape."""
        x = (torch.cat([images, reconstruction]) - self.mean) / self.deviation
        distance = torch.zeros((), device=images.device)
        for number, layer in enumerate(self.layers):
            x = layer(x)
            if number in STAGES:
                of_images, of_reconstruction = F.normalize(x.float(), dim=1).chunk(2)
                distance = distance + (of_images - of_reconstruction).square().sum(1).mean()
        return distance
