"""Fitting linear heads: logistic regression by L-BFGS, and start/end pointers by AdamW.

Features are divided by their root mean square before, and the weights after: the optimum is the same, reached in
fewer steps. Shapes: `N` examples, `D` n_embd, `C` labels, `B` windows of a batch, `L` tokens of the longest.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor
from tqdm import tqdm

WEIGHT_DECAYS = (1e-5, 1e-4, 1e-3, 1e-2, 1e-1)
"""Tried in turn, the validation part decides."""

STEPS_PER_ROUND = 5
MAX_ROUNDS = 60
PATIENCE = 4
"""Rounds, or epochs, without a better validation loss before fitting stops."""

LEARNING_RATE = 3e-3
BATCH_WINDOWS = 16
MAX_EPOCHS = 100
POINTER_WEIGHT_DECAY = 0.1


@dataclass(frozen=True, slots=True)
class Fitted:
    weight: NDArray[np.float32]
    bias: NDArray[np.float32] | None
    weight_decay: float
    num_rounds: int  # or epochs
    validation_loss: float


@dataclass(frozen=True, slots=True)
class Part:
    """Examples with their features [N, D] and targets [N, C]: one 1 per row, or any number if multi-label."""

    features: Tensor
    targets: Tensor


@dataclass(frozen=True, slots=True)
class Window:
    """A QA window: where to get its hidden states [num_tokens, D], and where its answer's first and last token are.

    `candidates` are the tokens that may be pointed at; `start` and `end` are among them.
    """

    load: Callable[[], NDArray[np.float32]]
    candidates: NDArray[np.int64]
    start: int
    end: int


def fit_classifier(train: Part, validation: Part, *, is_multi_label: bool, weight_decay: float | None) -> Fitted:
    """Multinomial or multi-label logistic regression without a bias, which `score` has none of."""
    scale = train.features.square().mean(dim=0).sqrt().clamp_min(1e-6)  # [D]
    train, validation = (Part(part.features / scale, part.targets) for part in (train, validation))
    decays = WEIGHT_DECAYS if weight_decay is None else (weight_decay,)
    best: Fitted | None = None
    with tqdm(total=len(decays) * MAX_ROUNDS, desc="fitting", unit="round") as progress:
        for number, decay in enumerate(decays, 1):
            fitted = _fit_one(train, validation, is_multi_label, decay, progress)
            if best is None or fitted.validation_loss < best.validation_loss:
                best = fitted
            progress.update(number * MAX_ROUNDS - progress.n)
    assert best is not None
    return Fitted(
        (best.weight / scale.numpy()).astype(np.float32), None, best.weight_decay, best.num_rounds, best.validation_loss
    )


def _fit_one(train: Part, validation: Part, is_multi_label: bool, decay: float, progress: "tqdm[None]") -> Fitted:
    weight = torch.zeros(train.targets.shape[1], train.features.shape[1], requires_grad=True)  # [C, D]
    optimizer = torch.optim.LBFGS([weight], max_iter=STEPS_PER_ROUND, line_search_fn="strong_wolfe")

    def loss() -> Tensor:
        optimizer.zero_grad()
        value = _loss(weight, train, is_multi_label) + decay / 2 * weight.square().sum()
        value.backward()  # type: ignore[no-untyped-call]
        return value

    best, best_weight, best_round, num_rounds = float("inf"), weight.detach().clone(), 0, 0
    while num_rounds < MAX_ROUNDS and num_rounds - best_round < PATIENCE:
        num_rounds += 1
        optimizer.step(loss)  # type: ignore[no-untyped-call]
        with torch.no_grad():
            current = float(_loss(weight, validation, is_multi_label))
        if current < best - 1e-5:
            best, best_weight, best_round = current, weight.detach().clone(), num_rounds
        progress.update()
        progress.set_postfix(weight_decay=decay, validation_loss=f"{best:.4f}")
    return Fitted(best_weight.numpy(), None, decay, best_round, best)


def _loss(weight: Tensor, part: Part, is_multi_label: bool) -> Tensor:
    logits = part.features @ weight.T  # [N, C]
    if is_multi_label:
        return F.binary_cross_entropy_with_logits(logits, part.targets)
    return F.cross_entropy(logits, part.targets)


def fit_pointers(train: Sequence[Window], validation: Sequence[Window], *, width: int, seed: int) -> Fitted:
    """Start and end of the answer, each a softmax over a window's candidates. Windows are loaded batch by batch."""
    rng = np.random.default_rng(seed)
    sample = rng.permutation(len(train))[: 4 * BATCH_WINDOWS]
    squares = np.concatenate([train[i].load() for i in sample]).astype(np.float64) ** 2
    scale = torch.from_numpy(np.sqrt(squares.mean(axis=0))).float().clamp_min(1e-6)
    weight = torch.zeros(2, width, requires_grad=True)
    bias = torch.zeros(2, requires_grad=True)
    optimizer = torch.optim.AdamW([weight, bias], lr=LEARNING_RATE, weight_decay=POINTER_WEIGHT_DECAY)
    best, best_epoch, num_epochs = float("inf"), 0, 0
    best_weight, best_bias = weight.detach().clone(), bias.detach().clone()
    with tqdm(total=MAX_EPOCHS, desc="fitting", unit="epoch") as progress:
        while num_epochs < MAX_EPOCHS and num_epochs - best_epoch < PATIENCE:
            num_epochs += 1
            for batch in _batches([train[i] for i in rng.permutation(len(train))]):
                optimizer.zero_grad()
                _pointer_loss(weight, bias, scale, batch).backward()  # type: ignore[no-untyped-call]
                optimizer.step()
            with torch.no_grad():
                losses = [float(_pointer_loss(weight, bias, scale, b)) * len(b) for b in _batches(validation)]
            current = sum(losses) / len(validation)
            if current < best - 1e-5:
                best, best_epoch = current, num_epochs
                best_weight, best_bias = weight.detach().clone(), bias.detach().clone()
            progress.update()
            progress.set_postfix(validation_loss=f"{best:.4f}")
    return Fitted((best_weight / scale).numpy(), best_bias.numpy(), POINTER_WEIGHT_DECAY, best_epoch, best)


def _batches(windows: Sequence[Window]) -> Iterator[Sequence[Window]]:
    for first in range(0, len(windows), BATCH_WINDOWS):
        yield windows[first : first + BATCH_WINDOWS]


def _pointer_loss(weight: Tensor, bias: Tensor, scale: Tensor, batch: Sequence[Window]) -> Tensor:
    """Mean over the windows of the cross-entropies of start and end."""
    states = [torch.from_numpy(window.load()) for window in batch]
    packed = F.linear(torch.cat(states), weight / scale, bias)  # [tokens of all windows, 2]
    logits = torch.nn.utils.rnn.pad_sequence(
        list(torch.split(packed, [len(part) for part in states])), batch_first=True
    )  # [B, L, 2]
    is_candidate = torch.zeros(logits.shape[:2], dtype=torch.bool)
    for row, window in enumerate(batch):
        is_candidate[row, torch.from_numpy(window.candidates)] = True
    logits = logits.masked_fill(~is_candidate[:, :, None], -torch.inf)
    targets = torch.tensor([[window.start, window.end] for window in batch])  # [B, 2]
    return F.cross_entropy(logits, targets)
