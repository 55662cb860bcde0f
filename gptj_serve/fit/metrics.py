"""What is reported of a head: accuracy and macro F1 of classes, exact match and F1 of answers as SQuAD counts them."""

import re
import string
from collections import Counter
from collections.abc import Iterable, Sequence

import numpy as np
from numpy.typing import NDArray

Flags = NDArray[np.bool_]  # [N, C]: which labels an example has

_ARTICLES = re.compile(r"\b(a|an|the)\b")
_WITHOUT_PUNCTUATION = str.maketrans("", "", string.punctuation)


def accuracy(predicted: Flags, actual: Flags) -> float:
    """Share of examples of which all labels are right."""
    return float((predicted == actual).all(axis=1).mean())


def macro_f1(predicted: Flags, actual: Flags) -> float:
    """Mean of the labels' F1; of a label that neither occurs nor is predicted there is none."""
    hits = (predicted & actual).sum(axis=0)
    total = predicted.sum(axis=0) + actual.sum(axis=0)
    scored = total > 0
    return float((2 * hits[scored] / total[scored]).mean()) if scored.any() else 0.0


def majority(train: Flags, count: int) -> Flags:
    """The baseline: every example gets the most frequent set of labels."""
    sets, frequencies = np.unique(train, axis=0, return_counts=True)
    return np.repeat(sets[[frequencies.argmax()]], count, axis=0)


def exact_match_and_f1(predicted: str, answers: Iterable[str]) -> tuple[float, float]:
    """The best over the answers, by the rules of SQuAD's evaluate-v1.1.py; no answers mean that none is right."""
    candidates = list(answers) or [""]
    words = _normalized(predicted)
    exact = max(float(words == _normalized(answer)) for answer in candidates)
    return exact, max(_word_f1(words, _normalized(answer)) for answer in candidates)


def _normalized(text: str) -> list[str]:
    return _ARTICLES.sub(" ", text.lower().translate(_WITHOUT_PUNCTUATION)).split()


def _word_f1(predicted: Sequence[str], actual: Sequence[str]) -> float:
    if not predicted or not actual:
        return float(predicted == actual)
    common = sum((Counter(predicted) & Counter(actual)).values())
    return 2 * common / (len(predicted) + len(actual))
