"""ViT-VQGAN's quantizer while it is trained: unit rows compared by cosine, moved by averages, dead ones revived.

Rows are not trained by gradients. Each follows the moving average of the features that got its code, as in VQ-VAE
(van den Oord et al., 2017, arXiv 1711.00937, appendix A.1); the encoder's gradients pass the codebook by an estimator.

The package vector-quantize-pytorch is not used: its averaged codebook asks the host at every step, makes one-hot
(N, K) floats, starts from one batch inside forward, cannot be kept still in DDP's warm-up, and needs four packages.
"""
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn

from token_files.codebook import quantize
from utils import is_main

ESTIMATORS = ('straight-through', 'rotation')
SMALL = 1e-8  # sums shorter than this have no direction


def rotate(unit: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
    """`rows`, with gradients that come to `unit` turned back by the rotation that takes each feature to its row.

    The rotation trick (Fifty et al., 2024, arXiv 2410.06424), for unit vectors.

    Args:
        unit: (N, d) unit features.
        rows: (N, d) unit rows, without gradient.
    """
    e = unit.detach()
    half = F.normalize(e + rows, dim=-1)
    turned = unit - 2 * (unit * half).sum(-1, keepdim=True) * half + 2 * (unit * e).sum(-1, keepdim=True) * rows
    return rows + (turned - turned.detach())  # the value is exactly the row, the gradient that of `turned`


def pass_through(unit: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
    """`rows`, with gradients that come to `unit` unchanged: the straight-through estimator."""
    return rows + (unit - unit.detach())


class VectorQuantizer(nn.Module):
    """A codebook of unit rows that follows the features it is given.

    A row is the direction of an exponential moving average of the unit features assigned to it. A row whose moving
    share of all features is small is replaced by a feature of the batch. All of it stays on the device.

    Args:
        codes: rows, K.
        dim: of a row, d.
        decay: of the averages, a step.
        revive_below: rows used less than this part of the mean use are replaced; 0 replaces none.
        estimator: of the encoder's gradients: 'straight-through' or 'rotation'.
    """

    def __init__(self, codes: int, dim: int, decay: float = 0.9, revive_below: float = 0.1,
                 estimator: str = 'straight-through'):
        super().__init__()
        self.decay = decay
        self.revive_below = revive_below
        self.estimate = rotate if estimator == 'rotation' else pass_through
        self.register_buffer('rows', F.normalize(torch.randn(codes, dim), dim=-1))
        self.register_buffer('sums', self.rows / codes)
        self.register_buffer('share', torch.full((codes,), 1 / codes))

    def set_rows(self, rows: torch.Tensor) -> None:
        """Start from rows (K, d) of any length, all used alike."""
        self.rows.copy_(F.normalize(rows, dim=-1))
        self.sums.copy_(self.rows / len(rows))
        self.share.fill_(1 / len(rows))

    def forward(self, features: torch.Tensor,
                draws: torch.Tensor | None = None) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Quantize features, in float32 also under autocast.

        Args:
            features: (B, n, d) of any length.
            draws: (K + 1,) random numbers in [0, 1). In training mode the codebook learns from these features, and
                they choose the features that dead rows are replaced by (rank 0's count). Without them it stays.

        Returns:
            The rows of the codes (B, n, d), which pass gradients on to the features; codes (B, n) int64; and the
            commitment loss (): the mean squared distance of an element from its row's.
        """
        with torch.autocast(features.device.type, enabled=False):
            unit = F.normalize(features.float(), dim=-1)
            flat = unit.flatten(0, 1)
            with torch.no_grad():
                codes = quantize(flat, self.rows)
                rows = self.rows[codes]
            if self.training and draws is not None:
                self._learn(flat.detach(), codes, draws)
            commitment = F.mse_loss(flat, rows)
            quantized = self.estimate(flat, rows).view_as(unit)
        return quantized, codes.view(unit.shape[:2]), commitment

    @torch.no_grad()
    def _learn(self, unit: torch.Tensor, codes: torch.Tensor, draws: torch.Tensor) -> None:
        """Move the averages by features (N, d) and their codes (N,), then revive dead rows."""
        row_count = len(self.rows)
        finite = unit.isfinite().all(1)
        unit = torch.where(finite[:, None], unit, 0)  # a bad step must not spoil the codebook
        # Dead rows start again at features of this batch. The draws come from the caller, who seeds a step.
        # One feature from each of K equal parts of the batch, which begin anywhere: none twice where there are K.
        positions = (torch.arange(row_count, device=unit.device) + draws[:row_count]) / row_count + draws[row_count]
        candidates = unit[(positions % 1 * len(unit)).long().clamp(max=len(unit) - 1)]
        # one tensor, so that ranks need one all_reduce a step; candidates are rank 0's, so that all ranks agree
        batch_sums = torch.cat([torch.zeros_like(self.sums).index_add_(0, codes, unit),
                           torch.zeros_like(self.share).index_add_(0, codes, finite.float())[:, None],
                           candidates if is_main() else torch.zeros_like(candidates)], 1)
        if dist.is_initialized():
            dist.all_reduce(batch_sums)
        width = unit.shape[1]
        total = batch_sums[:, width].sum().clamp(min=1)
        sums = torch.lerp(batch_sums[:, :width] / total, self.sums, self.decay)
        use_fraction = torch.lerp(batch_sums[:, width] / total, self.share, self.decay)
        rows = torch.where(sums.norm(dim=1, keepdim=True) > SMALL, F.normalize(sums, dim=1), self.rows)

        candidates = batch_sums[:, width + 1:]  # rank 0's
        dead = (use_fraction * row_count < self.revive_below) & candidates.any(1)
        self.rows.copy_(torch.where(dead[:, None], candidates, rows))
        self.sums.copy_(torch.where(dead[:, None], candidates / row_count, sums))
        self.share.copy_(torch.where(dead, 1 / row_count, use_fraction))
