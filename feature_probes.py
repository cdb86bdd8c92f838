"""How good frozen features are: k nearest neighbors, and a linear probe.

Neighbors vote as in DINO (arXiv 2104.14294) and Wu et al., 2018 (arXiv 1805.01978): with exp(cosine / temperature).
The linear probe is multinomial logistic regression on standardized features, by L-BFGS; nothing about it is random but
which tenth of the training features is held out to choose the weight decay, always the same one.
"""
import torch
import torch.nn.functional as F

from utils import InputError

TEMPERATURE = 0.07
DECAYS = (1., 1e-1, 1e-2, 1e-3, 1e-4, 1e-5)  # tried by the linear probe, the strongest first
MAX_ITERATIONS = 200  # of L-BFGS
CHUNK_ELEMENTS = 1 << 26  # of similarities or logits in memory at a time
HELD_OUT = 10  # one training feature in so many


def accuracies(scores: torch.Tensor, labels: torch.Tensor) -> dict[str, float]:
    """Top-1 and top-5 (%) of scores (N, classes) for labels (N,): {'acc1', 'acc5'}."""
    top = scores.topk(min(5, scores.shape[1]), dim=1).indices == labels[:, None]
    return {'acc1': 100 * top[:, 0].double().mean().item(), 'acc5': 100 * top.any(1).double().mean().item()}


# ---------------------------------------------------------------- k nearest neighbors

def neighbor_votes(train: torch.Tensor, labels: torch.Tensor, queries: torch.Tensor, classes: int, k: int = 20,
                   temperature: float = TEMPERATURE) -> torch.Tensor:
    """What the k training features of largest cosine similarity vote, for each query.

    Args:
        train: (N, D) float32 features.
        labels: (N,) int64, theirs.
        queries: (M, D) float32 features.
        classes: how many there are.
        k: neighbors, N at most.
        temperature: a neighbor of similarity s votes with exp((s - s_max) / temperature), so that none overflows.

    Returns:
        (M, classes) float32.

    Raises:
        InputError: for more neighbors than training features.
    """
    if k > len(train):
        raise InputError(f'{k} neighbors of {len(train)} training images: ask for fewer')
    keys = F.normalize(train, dim=1).T
    votes = []
    for part in F.normalize(queries, dim=1).split(max(1, CHUNK_ELEMENTS // len(train))):
        similarity, nearest = (part @ keys).topk(k, dim=1)
        weights = ((similarity - similarity[:, :1]) / temperature).exp()
        votes.append(weights.new_zeros(len(part), classes).scatter_add_(1, labels[nearest], weights))
    return torch.cat(votes)


# ---------------------------------------------------------------- linear probe

def standardize(train: torch.Tensor, other: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Two sets of features, (N, D) and (M, D), minus the mean of the first, divided by its deviation."""
    std, mean = torch.std_mean(train, dim=0, correction=0)
    std = torch.where(std > 0, std, 1.)
    return (train - mean) / std, (other - mean) / std


def scores_of(weights: torch.Tensor, features: torch.Tensor) -> torch.Tensor:
    """Logits (N, classes) of weights (D + 1, classes), the last row of which is the bias, for features (N, D)."""
    return features @ weights[:-1] + weights[-1]


def fit_linear(features: torch.Tensor, labels: torch.Tensor, decay: float, start: torch.Tensor) -> torch.Tensor:
    """Minimize mean cross-entropy + decay / 2 · |weights|², the bias without decay, by L-BFGS.

    Args:
        features: (N, D) float32, standardized.
        labels: (N,) int64.
        decay: above 0, so that there is one minimum.
        start: (D + 1, classes) weights to begin from, see `scores_of`.

    Returns:
        (D + 1, classes).
    """
    weights = torch.nn.Parameter(start.clone())
    chunk = max(1, CHUNK_ELEMENTS // start.shape[1])
    optimizer = torch.optim.LBFGS([weights], max_iter=MAX_ITERATIONS, history_size=10, tolerance_grad=1e-6,
                                  tolerance_change=1e-9, line_search_fn='strong_wolfe')

    @torch.no_grad()
    def loss_and_gradient() -> torch.Tensor:
        """In chunks, so that never all logits are in memory."""
        penalty = decay * weights
        penalty[-1] = 0
        loss = (penalty * weights).sum() / 2
        weights.grad = penalty
        for x, y in zip(features.split(chunk), labels.split(chunk)):
            logits = scores_of(weights, x)
            loss += F.cross_entropy(logits, y, reduction='sum') / len(features)
            errors = logits.softmax(1)
            errors[torch.arange(len(y), device=y.device), y] -= 1
            errors /= len(features)
            weights.grad[:-1] += x.T @ errors
            weights.grad[-1] += errors.sum(0)
        return loss

    optimizer.step(loss_and_gradient)
    return weights.detach()


def linear_probe(train: torch.Tensor, labels: torch.Tensor, queries: torch.Tensor, classes: int,
                 decays: tuple[float, ...] = DECAYS) -> tuple[torch.Tensor, float]:
    """Scores (M, classes) of queries (M, D), and the weight decay of the least loss on a held-out tenth.

    The loss and not the accuracy, because that of a few images is mostly chance.

    Args:
        train: (N, D) float32 features.
        labels: (N,) int64, theirs.
        queries: (M, D) float32 features.
        classes: how many there are.
        decays: to try.

    Raises:
        InputError: for fewer than ten training features.
    """
    if len(train) < HELD_OUT:
        raise InputError(f'{len(train)} training images: a linear probe holds one in {HELD_OUT} of them out')
    train, queries = standardize(train, queries)
    order = torch.randperm(len(train), generator=torch.Generator().manual_seed(0)).to(train.device)
    held, rest = order[:len(train) // HELD_OUT], order[len(train) // HELD_OUT:]
    weights = train.new_zeros(train.shape[1] + 1, classes)
    losses = {}
    for decay in decays:
        weights = fit_linear(train[rest], labels[rest], decay, weights)
        losses[decay] = F.cross_entropy(scores_of(weights, train[held]), labels[held]).item()
    best = min(losses, key=losses.get)
    weights = fit_linear(train, labels, best, torch.zeros_like(weights))
    return scores_of(weights, queries), best
