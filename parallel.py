"""The model as the training loop calls it: compiled, and in DDP."""
import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from engine import autocast
from utils import world_size


def parallel(model: nn.Module, compiled: bool, device: torch.device, amp: str, *inputs: torch.Tensor) -> nn.Module:
    """The model on `device`, by torch.compile if `compiled`, and in DDP where there are several ranks.

    Args:
        model: on the device.
        compiled: whether torch.compile comes first.
        device: of the model.
        amp: 'bf16', 'fp16' or 'off'.
        *inputs: like those of a batch, on the device.
    """
    train_model = torch.compile(model) if compiled else model
    if world_size() > 1:
        train_model = DistributedDataParallel(train_model, device_ids=[device.index] if device.type == 'cuda' else None,
                                              gradient_as_bucket_view=True)
        # DDP arranges its buckets for good after a first backward. Their layout decides in which order ranks are
        # summed, so a resumed run must not begin with another.
        with autocast(device, amp):
            train_model(*inputs).float().sum().backward()
        model.zero_grad()
    return train_model
