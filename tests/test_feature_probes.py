"""Neighbors and linear probes, compared with scikit-learn."""
import numpy as np
import pytest
import torch
from sklearn.linear_model import LogisticRegression
from sklearn.neighbors import KNeighborsClassifier

import feature_probes
from feature_probes import accuracies, fit_linear, linear_probe, neighbor_votes, scores_of, standardize
from helpers import fails


def clouds(n, classes=5, dim=12, noise=3., seed=0):
    """Features (n, dim) float32 around a center for each class, and their labels (n,)."""
    generator = torch.Generator().manual_seed(seed)
    centers = torch.randn(classes, dim, generator=torch.Generator().manual_seed(99))
    labels = torch.randint(classes, (n,), generator=generator)
    labels[:classes] = torch.arange(classes)
    return centers[labels] + noise * torch.randn(n, dim, generator=generator), labels


@pytest.mark.parametrize('k', [1, 7, 20])
@pytest.mark.parametrize('temperature', [0.07, 1.])
def test_neighbors_are_those_of_scikit_learn(k, temperature, monkeypatch):
    """Votes by class, also where similarities are made in several chunks."""
    train, labels = clouds(150)
    queries, _ = clouds(61, seed=1)

    def weights_of(distances):
        return np.exp((1 - distances) / temperature)

    theirs = KNeighborsClassifier(k, weights=weights_of, metric='cosine', algorithm='brute')
    theirs.fit(train.numpy(), labels.numpy())
    monkeypatch.setattr(feature_probes, 'CHUNK_ELEMENTS', 17 * 150)
    votes = neighbor_votes(train, labels, queries, 5, k, temperature)
    shares = votes / votes.sum(1, keepdim=True)
    np.testing.assert_allclose(shares, theirs.predict_proba(queries.numpy()), atol=1e-4)
    assert (votes.argmax(1).numpy() == theirs.predict(queries.numpy())).all()


def test_a_low_temperature_does_not_overflow():
    train, labels = clouds(40, noise=0.1)
    votes = neighbor_votes(train, labels, train, 5, 10, 1e-4)
    assert votes.isfinite().all() and (votes.argmax(1) == labels).all()


def test_more_neighbors_than_images_are_one_line():
    train, labels = clouds(10)
    fails(lambda: neighbor_votes(train, labels, train, 5, 11), '11 neighbors of 10 training images: ask for fewer')
    fails(lambda: linear_probe(train[:9], labels[:9], train, 5), '9 training images: a linear probe holds one in 10')


@pytest.mark.parametrize('decay', [1e-1, 1e-3])
def test_the_linear_probe_is_the_regression_of_scikit_learn(decay, monkeypatch):
    train, labels = clouds(300)
    queries, _ = clouds(50, seed=1)
    train, queries = standardize(train * torch.arange(1., 13), queries * torch.arange(1., 13))
    theirs = LogisticRegression(C=1 / (decay * len(train)), tol=1e-8, max_iter=1000).fit(train.numpy(), labels.numpy())
    monkeypatch.setattr(feature_probes, 'CHUNK_ELEMENTS', 5 * 64)
    weights = fit_linear(train, labels, decay, torch.zeros(13, 5))
    probabilities = scores_of(weights, queries).softmax(1)
    np.testing.assert_allclose(probabilities, theirs.predict_proba(queries.numpy()), atol=2e-3)
    assert torch.equal(weights, fit_linear(train, labels, decay, torch.zeros(13, 5)))


def test_standardizing_uses_the_first_set_and_leaves_constants_finite():
    train, _ = clouds(100)
    train[:, 3] = 7
    ours, other = standardize(5 + 2 * train, train)
    torch.testing.assert_close(ours.mean(0), torch.zeros(12), atol=1e-5, rtol=0)
    torch.testing.assert_close(ours.std(0, correction=0)[4:], torch.ones(8))
    assert (ours[:, 3] == 0).all() and other.isfinite().all()
    torch.testing.assert_close(other[:, 0], (train[:, 0] - (5 + 2 * train[:, 0]).mean()) / (2 * train[:, 0]).std(
        correction=0))


def test_the_weight_decay_is_chosen_on_held_out_features():
    """Few images, many dimensions of noise: little decay overfits, and is not taken; a useless one is not."""
    train, labels = clouds(200, classes=2, dim=100, noise=6.)
    queries, wanted = clouds(400, classes=2, dim=100, noise=6., seed=1)
    decays = (1e3, 1., 1e-7)
    scores, best = linear_probe(train, labels, queries, 2, decays)
    assert best == 1 and torch.equal(scores, linear_probe(train, labels, queries, 2, decays)[0])
    alone = {decay: linear_probe(train, labels, queries, 2, (decay,))[0] for decay in decays}
    assert torch.equal(scores, alone[1.])
    assert accuracies(scores, wanted)['acc1'] > accuracies(alone[1e-7], wanted)['acc1']


def test_accuracies():
    scores = torch.tensor([[3., 2, 1, 0, -1, -2], [0, 1, 2, 3, 4, 5], [0, 1, 2, 3, 4, 5]])
    assert accuracies(scores, torch.tensor([0, 5, 0])) == pytest.approx({'acc1': 200 / 3, 'acc5': 200 / 3})
    assert accuracies(scores, torch.tensor([4, 1, 5])) == pytest.approx({'acc1': 100 / 3, 'acc5': 100})
    assert accuracies(scores[:, :3], torch.tensor([2, 2, 0])) == pytest.approx({'acc1': 100 / 3, 'acc5': 100})
