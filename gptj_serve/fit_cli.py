"""`fit classifier` and `fit qa`: commands that make a task head for a checkpoint."""

import asyncio
from collections.abc import Coroutine
from enum import StrEnum
from importlib.resources import files
from pathlib import Path
from typing import Annotated, Any

import torch
import typer

from gptj_serve.config import DEMO_CHECKPOINT
from gptj_serve.errors import GPTJServeError
from gptj_serve.fit.classifier import fit_classifier_head
from gptj_serve.fit.examples import read_questions, read_texts
from gptj_serve.fit.features import FeatureConfig
from gptj_serve.fit.job import FitJob
from gptj_serve.fit.qa import fit_qa_head
from gptj_serve.pipeline.threads import threads_per_stage
from gptj_serve.types import Pooling

app = typer.Typer(
    name="fit",
    help="Make a task head for a checkpoint from labelled examples.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
)


class Dtype(StrEnum):
    FLOAT32 = "float32"
    BFLOAT16 = "bfloat16"
    FLOAT16 = "float16"


class ClassifierPooling(StrEnum):
    MEAN = "mean"
    LAST = "last"


ExamplesOption = Annotated[Path, typer.Argument(help="The labelled examples.")]
OutputOption = Annotated[Path, typer.Option("--output", "-o", help="Directory of the head; its name names the head.")]
CheckpointOption = Annotated[str, typer.Option("--checkpoint", help="Checkpoint directory, or 'demo'.")]
TestOption = Annotated[
    Path | None, typer.Option("--test", help="Examples to report on, instead of a held-out part of the others.")
]
HoldoutOption = Annotated[float, typer.Option(min=0.01, max=0.5, help="Fraction to report on.")]
ValidationOption = Annotated[float, typer.Option(min=0.01, max=0.5, help="Fraction to stop by.")]
SeedOption = Annotated[int, typer.Option(min=0, help="Of the split and the order of examples.")]
StagesOption = Annotated[int, typer.Option("--num-stages", min=1, help="Pipeline stages in this process.")]
ThreadsOption = Annotated[int | None, typer.Option("--num-threads", min=1, help="Torch threads. Default: all cores.")]
DtypeOption = Annotated[Dtype, typer.Option(help="Of weights and hidden states.")]
DeviceOption = Annotated[str, typer.Option(help="cpu, or cuda.")]
CacheOption = Annotated[
    Path | None, typer.Option("--cache", help="Directory of the feature cache. Default: OUTPUT.features.")
]
ForceOption = Annotated[bool, typer.Option("--force", help="Replace an existing head.")]


@app.command()
def classifier(
    examples: ExamplesOption,
    output: OutputOption,
    checkpoint: CheckpointOption = DEMO_CHECKPOINT,
    test: TestOption = None,
    text_field: Annotated[str, typer.Option(help="Name of the field or column with the text.")] = "text",
    label_field: Annotated[str, typer.Option(help="Name of the field or column with the label or labels.")] = "label",
    label_separator: Annotated[
        str | None, typer.Option(help="The label column has several labels, separated by this: multi-label.")
    ] = None,
    pooling: Annotated[
        ClassifierPooling,
        typer.Option(help="What the head looks at: the mean of the hidden states, or (as in transformers) the last."),
    ] = ClassifierPooling.MEAN,
    weight_decay: Annotated[
        float | None, typer.Option(min=0, help="Default: the best of several on the validation part.")
    ] = None,
    holdout: HoldoutOption = 0.1,
    validation: ValidationOption = 0.1,
    seed: SeedOption = 0,
    num_stages: StagesOption = 1,
    num_threads: ThreadsOption = None,
    dtype: DtypeOption = Dtype.FLOAT32,
    device: DeviceOption = "cpu",
    cache: CacheOption = None,
    force: ForceOption = False,
) -> None:
    """Fit a classification head to texts with labels (.jsonl, .csv or .tsv)."""

    async def run() -> dict[str, Any]:
        texts, test_texts = (
            read_texts(file, text_field=text_field, label_field=label_field, label_separator=label_separator)
            if file is not None
            else None
            for file in (examples, test)
        )
        assert texts is not None
        job = FitJob.open(
            _checkpoint_dir(checkpoint), output, cache_dir=cache,
            features=_features(num_stages, num_threads, dtype, device, Pooling(pooling)),
            holdout=holdout, validation=validation, seed=seed, replace=force,
        )  # fmt: skip
        return await fit_classifier_head(job, texts, test_texts, weight_decay)

    _report(run(), output)


@app.command()
def qa(
    examples: ExamplesOption,
    output: OutputOption,
    checkpoint: CheckpointOption = DEMO_CHECKPOINT,
    test: TestOption = None,
    limit: Annotated[int | None, typer.Option(min=10, help="Take only so many questions.")] = None,
    holdout: HoldoutOption = 0.1,
    validation: ValidationOption = 0.1,
    seed: SeedOption = 0,
    num_stages: StagesOption = 1,
    num_threads: ThreadsOption = None,
    dtype: DtypeOption = Dtype.FLOAT32,
    device: DeviceOption = "cpu",
    cache: CacheOption = None,
    force: ForceOption = False,
) -> None:
    """Fit an extractive QA head to questions in SQuAD's format (.json, or .jsonl with a question per line)."""

    async def run() -> dict[str, Any]:
        questions = read_questions(examples)[:limit]
        test_questions = read_questions(test)[:limit] if test is not None else []
        job = FitJob.open(
            _checkpoint_dir(checkpoint), output, cache_dir=cache,
            features=_features(num_stages, num_threads, dtype, device),
            holdout=holdout, validation=validation, seed=seed, replace=force,
        )  # fmt: skip
        return await fit_qa_head(job, questions, test_questions)

    _report(run(), output)


def _checkpoint_dir(checkpoint: str) -> Path:
    return Path(str(files("gptj_serve") / "demo")) if checkpoint == DEMO_CHECKPOINT else Path(checkpoint).expanduser()


def _features(
    num_stages: int, num_threads: int | None, dtype: Dtype, device: str, pooling: Pooling = Pooling.ALL
) -> FeatureConfig:
    torch.set_num_threads(threads_per_stage(num_stages, num_threads))
    return FeatureConfig(num_stages=num_stages, dtype=getattr(torch, dtype), device=device, pooling=pooling)


def _report(run: Coroutine[Any, Any, dict[str, Any]], output: Path) -> None:
    try:
        figures = asyncio.run(run)
    except* GPTJServeError as group:
        error: BaseException = group
        while isinstance(error, BaseExceptionGroup):
            error = error.exceptions[0]
        typer.echo(f"error: {error}", err=True)
        raise typer.Exit(1) from None
    width = max(map(len, figures))
    for name, value in figures.items():
        typer.echo(f"{name.replace('_', ' '):{width}}  {value}")
    typer.echo(f"written to {output}")


if __name__ == "__main__":
    app()
