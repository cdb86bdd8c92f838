"""The quantizer while it is trained: codes, gradients, moving rows, revival."""
import pytest
import torch
import torch.nn.functional as F

from image_tokenizer.vector_quantizer import VectorQuantizer, pass_through, rotate
from token_files.codebook import quantize


def unit(*shape, seed=0):
    return F.normalize(torch.randn(*shape, generator=torch.Generator().manual_seed(seed)), dim=-1)


def draws(codes, seed=0):
    return torch.rand(codes + 1, generator=torch.Generator().manual_seed(seed))


@pytest.fixture
def quantizer():
    torch.manual_seed(0)
    return VectorQuantizer(20, 8)


def rotation(a, b):
    """The rotation matrix that takes unit a to unit b in their plane, by its textbook form."""
    cross = torch.outer(b, a) - torch.outer(a, b)
    return torch.eye(len(a), dtype=a.dtype) + cross + cross @ cross / (1 + a @ b)


def test_the_rotation_trick_turns_gradients_back():
    e = F.normalize(unit(5, 8).double(), dim=-1).requires_grad_()  # as float32 their lengths are 1 to 1e-7 only
    rows = F.normalize(unit(5, 8, seed=1).double(), dim=-1)
    gradient = torch.randn(5, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    out = rotate(e, rows)
    out.backward(gradient)
    assert torch.equal(out, rows)
    for i in range(5):
        matrix = rotation(e[i].detach(), rows[i])
        torch.testing.assert_close(matrix @ e[i].detach(), rows[i])
        torch.testing.assert_close(e.grad[i], matrix.T @ gradient[i])


def test_straight_through_leaves_gradients_alone():
    e = unit(5, 8).requires_grad_()
    rows = unit(5, 8, seed=1)
    gradient = torch.randn(5, 8)
    out = pass_through(e, rows)
    out.backward(gradient)
    assert torch.equal(out, rows) and torch.equal(e.grad, gradient)


def test_codes_rows_and_commitment(quantizer):
    features = 3 * torch.randn(2, 6, 8)
    quantized, codes, commitment = quantizer(features)
    assert torch.equal(codes, quantize(features, quantizer.rows))
    assert torch.equal(quantized, quantizer.rows[codes])
    torch.testing.assert_close(commitment, F.mse_loss(F.normalize(features, dim=-1), quantizer.rows[codes]))


def test_float32_under_autocast(quantizer):
    features = torch.randn(2, 6, 8).bfloat16()
    with torch.autocast('cpu', torch.bfloat16):
        quantized, codes, commitment = quantizer(features)
    assert quantized.dtype == commitment.dtype == torch.float32
    assert torch.equal(codes, quantizer(features.float())[1])


def test_rows_follow_the_mean_of_their_features():
    quantizer = VectorQuantizer(3, 4, decay=0.75, revive_below=0)
    quantizer.set_rows(torch.eye(4)[:3])
    features = F.normalize(torch.eye(4)[[0, 0, 1]] + 0.1, dim=1)
    quantizer(features[None], draws(3))
    sums = 0.75 * torch.eye(4)[:3] / 3
    sums[0] += 0.25 * 2 / 3 * features[0]
    sums[1] += 0.25 / 3 * features[2]
    torch.testing.assert_close(quantizer.sums, sums)
    torch.testing.assert_close(quantizer.rows, F.normalize(sums, dim=1))
    torch.testing.assert_close(quantizer.share, torch.tensor([0.75 / 3 + 0.5 / 3, 0.75 / 3 + 0.25 / 3, 0.75 / 3]))


def test_it_stays_without_draws_and_in_eval_mode(quantizer):
    before = {name: value.clone() for name, value in quantizer.state_dict().items()}
    quantizer(torch.randn(2, 6, 8))
    quantizer.eval()
    quantizer(torch.randn(2, 6, 8), draws(20))
    assert all(torch.equal(before[name], value) for name, value in quantizer.state_dict().items())


def test_features_that_are_not_finite_leave_no_trace(quantizer):
    features = torch.randn(4, 50, 8)
    features[1] = torch.nan
    quantizer(features, draws(20))
    assert all(value.isfinite().all() for value in quantizer.state_dict().values())
    torch.testing.assert_close(quantizer.share.sum(), torch.tensor(1.))


def collapsed(revive_below):
    """The usage of a codebook that began with all rows in one place, far from most features."""
    torch.manual_seed(0)
    quantizer = VectorQuantizer(64, 8, decay=0.9, revive_below=revive_below)
    quantizer.set_rows(torch.eye(8)[:1] + 1e-3 * torch.randn(64, 8))
    centers = unit(64, 8, seed=3)

    def features(number, seed):
        generator = torch.Generator().manual_seed(seed)
        chosen = centers[torch.randint(64, (1, number), generator=generator)]
        return chosen + 0.1 * torch.randn(chosen.shape, generator=generator)

    for step in range(150):
        quantizer(features(512, step), draws(64, step))
    return len(quantizer(features(4096, 1000))[1].unique()) / 64


def test_revival_mends_a_collapsed_codebook():
    assert collapsed(0) < 0.5
    assert collapsed(0.1) > 0.9
