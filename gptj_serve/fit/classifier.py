"""`fit_classifier_head`: from labelled texts to a classification head."""

from typing import Any

import numpy as np
import torch

from gptj_serve.errors import DataError
from gptj_serve.fit.examples import LabelledTexts, split
from gptj_serve.fit.features import compute_features, key_of
from gptj_serve.fit.job import FitJob, check_parts
from gptj_serve.fit.linear import Part, fit_classifier
from gptj_serve.fit.metrics import Flags, accuracy, macro_f1, majority
from gptj_serve.model.heads import HeadKind


async def fit_classifier_head(
    job: FitJob, texts: LabelledTexts, test: LabelledTexts | None = None, weight_decay: float | None = None
) -> dict[str, Any]:
    """Fit on a part of `texts`, stop by another, report on `test` or a third; returns the report."""
    labels = texts.labels
    examples = texts.examples
    token_ids = [_encode(job, e.text, e.source) for e in [*examples, *(test.examples if test else [])]]
    parts = split([e.text for e in examples], [job.validation, *([] if test else [job.holdout])], job.seed)
    check_parts(parts, len(examples))
    if test is not None:
        _check_test(texts, test)
        parts.append(list(range(len(examples), len(examples) + len(test.examples))))
        examples = [*examples, *test.examples]
    place = {label: index for index, label in enumerate(labels)}
    flags: Flags = np.zeros((len(examples), len(labels)), dtype=np.bool_)
    for row, example in enumerate(examples):
        flags[row, [place[label] for label in example.labels]] = True
    train, validation, held_out = parts
    num_classes = len(np.unique(flags[train], axis=0))
    if num_classes < 2:
        raise DataError(f"the training part of {len(train)} examples has one class only")
    with job.open_cache() as cache:
        await compute_features(job.checkpoint, job.features, cache, token_ids)
        states = np.concatenate([cache[key_of(ids)] for ids in token_ids])
    features, targets = torch.from_numpy(states), torch.from_numpy(flags).float()
    fitted = fit_classifier(
        Part(features[train], targets[train]),
        Part(features[validation], targets[validation]),
        is_multi_label=texts.is_multi_label,
        weight_decay=weight_decay,
    )
    logits = states[held_out] @ fitted.weight.T
    predicted = logits > 0 if texts.is_multi_label else np.eye(len(labels), dtype=np.bool_)[logits.argmax(axis=1)]
    baseline = majority(flags[train], len(held_out))
    figures = {
        "training_examples": len(train),
        "validation_examples": len(validation),
        "held_out_examples": len(held_out),
        "accuracy": round(accuracy(predicted, flags[held_out]), 4),
        "macro_f1": round(macro_f1(predicted, flags[held_out]), 4),
        "majority_accuracy": round(accuracy(baseline, flags[held_out]), 4),
        "majority_macro_f1": round(macro_f1(baseline, flags[held_out]), 4),
    }
    problem_type = f"{'multi' if texts.is_multi_label else 'single'}_label_classification"
    return job.save(
        HeadKind.CLASSIFIER, fitted, figures, labels=labels, problem_type=problem_type, pooling=job.features.pooling
    )


def _check_test(texts: LabelledTexts, test: LabelledTexts) -> None:
    for example in test.examples:
        if unknown := set(example.labels).difference(texts.labels):
            raise DataError(f"{example.source}: no training example has the label {min(unknown)!r}")
    if texts.is_multi_label != test.is_multi_label:
        raise DataError("training and test file must both have single labels or both lists of them")


def _encode(job: FitJob, text: str, source: str) -> list[int]:
    token_ids = job.tokenizer.encode(text)
    limit = job.checkpoint.config.n_positions
    if len(token_ids) > limit:
        raise DataError(f"{source}: the text has {len(token_ids)} tokens; the model's context is {limit}")
    return token_ids
