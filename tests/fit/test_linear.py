"""The fits find the optimum, and stop by the validation part."""

import numpy as np
import pytest
import torch

from gptj_serve.fit.linear import MAX_ROUNDS, Part, Window, fit_classifier, fit_pointers

pytestmark = pytest.mark.usefixtures("one_torch_thread")


def blobs(seed: int, count: int = 200) -> Part:
    """Three clouds in eight dimensions of very different scale."""
    rng = np.random.default_rng(seed)
    labels = rng.integers(3, size=count)
    centers = np.random.default_rng(9).normal(size=(3, 8)) * 2
    features = (centers[labels] + rng.normal(size=(count, 8))) * np.logspace(-2, 2, 8)
    return Part(torch.from_numpy(features).float(), torch.eye(3)[labels])


def test_the_classifier_is_at_the_optimum_of_its_loss():
    """The gradient of cross-entropy plus decay, in the scaled coordinates, vanishes."""
    train = blobs(0)
    fitted = fit_classifier(train, train, is_multi_label=False, weight_decay=0.01)
    scale = train.features.square().mean(dim=0).sqrt()
    weight = (torch.from_numpy(fitted.weight) * scale).requires_grad_()
    logits = train.features / scale @ weight.T
    loss = torch.nn.functional.cross_entropy(logits, train.targets) + 0.005 * weight.square().sum()
    (gradient,) = torch.autograd.grad(loss, weight)
    assert gradient.abs().max() < 1e-2
    predicted = (train.features @ torch.from_numpy(fitted.weight).T).argmax(-1)
    assert (predicted == train.targets.argmax(-1)).float().mean() > 0.9


def test_validation_chooses_the_decay_and_the_round():
    rng = torch.Generator().manual_seed(0)
    noise = Part(torch.randn(40, 60, generator=rng), torch.eye(2)[torch.randint(2, (40,), generator=rng)])
    other = Part(torch.randn(400, 60, generator=rng), torch.eye(2)[torch.randint(2, (400,), generator=rng)])
    chosen = fit_classifier(noise, other, is_multi_label=False, weight_decay=None)
    assert chosen.weight_decay == 0.1  # there is nothing to learn: the strongest hurts least
    weak = fit_classifier(noise, other, is_multi_label=False, weight_decay=1e-5)
    assert weak.num_rounds < MAX_ROUNDS
    assert weak.validation_loss > chosen.validation_loss


def test_several_labels_are_fitted_each_for_itself():
    part = blobs(1)
    both = torch.stack([part.targets[:, 0], 1 - part.targets[:, 0]], dim=1)
    fitted = fit_classifier(
        Part(part.features, both), Part(part.features, both), is_multi_label=True, weight_decay=1e-3
    )
    np.testing.assert_allclose(fitted.weight[0], -fitted.weight[1], rtol=0.05, atol=1e-3 * np.abs(fitted.weight).max())


def make_window(rng: np.random.Generator) -> Window:
    """The answer begins where dimension 0 is high and ends where dimension 1 is; it never lies in the question."""
    states = rng.normal(size=(int(rng.integers(8, 20)), 6)).astype(np.float32)
    start = int(rng.integers(4, len(states)))
    end = int(rng.integers(start, len(states)))
    states[start, 0] += 12
    states[end, 1] += 12
    states[1] += 40  # a token of the question: not a candidate
    return Window(lambda: states, np.array([0, *range(3, len(states))]), start, end)


def test_pointers_find_first_and_last_token():
    rng = np.random.default_rng(0)
    train, validation = [[make_window(rng) for _ in range(count)] for count in (64, 40)]
    fitted = fit_pointers(train, validation, width=6, seed=0)
    again = fit_pointers(train, validation, width=6, seed=0)
    np.testing.assert_array_equal(fitted.weight, again.weight)
    hits = 0
    for window in validation:
        logits = window.load()[window.candidates] @ fitted.weight.T + fitted.bias
        hits += tuple(window.candidates[logits.argmax(axis=0)]) == (window.start, window.end)
    assert hits >= 28  # of 40; by chance it would be none or one
