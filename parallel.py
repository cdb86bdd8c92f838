"""A model as the loop calls it: compiled, and with gradients summed over all processes."""
import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from engine import autocast
from utils import world_size


def parallel(model: nn.Module, compiled: bool, amp: str, *inputs: torch.Tensor) -> nn.Module:
    """The model by torch.compile if `compiled`, in DDP where there are several processes.

    Args:
        model: on its device.
        compiled: see above.
        amp: 'bf16', 'fp16' or 'off'.
        *inputs: of the model, of the shapes that batches will have, on its device.
    """
    device = inputs[0].device
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
