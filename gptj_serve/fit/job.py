"""What the two fits have in common: the checkpoint and its tokenizer, where the cache lies, what is written."""

import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Self

from gptj_serve.errors import CheckpointError, DataError
from gptj_serve.fit.features import FeatureCache, FeatureConfig, open_cache
from gptj_serve.fit.linear import Fitted
from gptj_serve.model.checkpoint import Checkpoint
from gptj_serve.model.heads import HeadCheckpoint, HeadInfo, HeadKind, fingerprint
from gptj_serve.tokenizer import Tokenizer
from gptj_serve.types import Pooling


@dataclass(frozen=True, slots=True)
class FitJob:
    """One run of `fit`."""

    checkpoint: Checkpoint
    tokenizer: Tokenizer
    output: Path
    cache_dir: Path
    features: FeatureConfig
    holdout: float
    validation: float
    seed: int
    replace: bool
    started_at: float

    @classmethod
    def open(
        cls,
        checkpoint_dir: Path,
        output: Path,
        *,
        cache_dir: Path | None = None,
        features: FeatureConfig | None = None,
        holdout: float = 0.1,
        validation: float = 0.1,
        seed: int = 0,
        replace: bool = False,
    ) -> Self:
        """Check all that can be checked before any work. Raises `CheckpointError` or `DataError`."""
        checkpoint = Checkpoint.open(checkpoint_dir)
        tokenizer = Tokenizer.from_directory(checkpoint_dir)
        features = features or FeatureConfig()
        if not 1 <= features.num_stages <= checkpoint.config.n_layer:
            raise DataError(f"num_stages={features.num_stages}: must be 1 to n_layer={checkpoint.config.n_layer}")
        if output.exists() and not replace:
            raise CheckpointError(f"{output}: exists already")
        cache_dir = cache_dir or output.with_name(f"{output.name}.features")
        started_at = time.monotonic()
        return cls(
            checkpoint, tokenizer, output, cache_dir, features, holdout, validation, seed, replace, started_at
        )  # fmt: skip

    def pooled(self, pooling: Pooling) -> Self:
        return replace(self, features=replace(self.features, pooling=pooling))

    def open_cache(self) -> FeatureCache:
        return open_cache(self.cache_dir, self.checkpoint, self.features)

    def save(
        self,
        kind: HeadKind,
        fitted: Fitted,
        figures: dict[str, Any],
        *,
        labels: Sequence[str] = (),
        problem_type: str | None = None,
        pooling: Pooling = Pooling.LAST,
    ) -> dict[str, Any]:
        """Write the head; returns its figures."""
        figures = figures | {
            "weight_decay": fitted.weight_decay,
            "rounds": fitted.num_rounds,
            "validation_loss": round(fitted.validation_loss, 5),
            "seed": self.seed,
            "seconds": round(time.monotonic() - self.started_at, 1),
        }
        info = HeadInfo.model_validate(
            {
                "kind": kind,
                "name": self.output.name,
                "labels": list(labels),
                "problem_type": problem_type,
                "pooling": pooling,
                "backbone": fingerprint(self.checkpoint),
                "figures": figures,
            }
        )
        HeadCheckpoint(self.output, info, fitted.weight, fitted.bias).save(replace=self.replace)
        return figures


def check_parts(parts: Sequence[Sequence[int]], count: int) -> None:
    """Every part must have something in it."""
    names = ("training", "validation", "held-out")
    for name, part in zip(names, parts, strict=False):
        if not part:
            raise DataError(f"{count} examples leave none for the {name} part")
