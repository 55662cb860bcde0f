"""Train, export and evaluate the demo checkpoint: `python -m training.train_demo train|export|evaluate`."""

import math
from pathlib import Path
from typing import Annotated

import torch
import typer

from training.evaluate import measure_answers, measure_intents, measure_perplexity
from training.export import export_demo, load_demo
from training.loop import Settings, load_trained, start_or_resume
from training.sources import read_intents, read_test_questions, read_texts

app = typer.Typer(add_completion=False, no_args_is_help=True, help=__doc__)

DataOption = Annotated[Path, typer.Option(help="Directory with corpora/, classify/ and qa/.", file_okay=False)]
RunOption = Annotated[Path, typer.Option(help="Directory of checkpoints and log.")]
DemoOption = Annotated[Path, typer.Option(help="The exported checkpoint.", file_okay=False)]
DeviceOption = Annotated[str, typer.Option(help="cpu, cuda, cuda:1 …; auto takes a GPU when there is one.")]
ThreadsOption = Annotated[int, typer.Option(help="CPU threads.", min=1)]


@app.command()
def train(
    data: DataOption = Path("data"),
    run: RunOption = Path("training/runs/demo"),
    steps: Annotated[int, typer.Option(help="Optimiser steps of the whole schedule.", min=1)] = 1400,
    minutes: Annotated[float, typer.Option(help="Shorten the schedule to this much training time.")] = math.inf,
    seed: int = 0,
    device: DeviceOption = "auto",
    threads: ThreadsOption = 2,
    compile: Annotated[bool, typer.Option(help="Compile the layers; needs a C++ compiler.")] = True,
    checkpoint_every: Annotated[int, typer.Option(min=1)] = 50,
    evaluate_every: Annotated[int, typer.Option(min=1)] = 200,
) -> None:
    """Train, or go on from the run's last checkpoint."""
    torch.set_num_threads(threads)
    settings = Settings(
        data, run, steps, 60 * minutes, seed, choose_device(device), compile, checkpoint_every, evaluate_every
    )
    training, batches = start_or_resume(settings)
    training.run(batches)


@app.command()
def export(run: RunOption = Path("training/runs/demo"), out: DemoOption = Path("gptj_serve/demo")) -> None:
    """Write the run's last checkpoint as a demo folder."""
    export_demo(*load_trained(run), out)


@app.command()
def evaluate(
    data: DataOption = Path("data"),
    demo: DemoOption = Path("gptj_serve/demo"),
    device: DeviceOption = "auto",
    threads: ThreadsOption = 2,
) -> None:
    """Measure the exported weights in fp32 on held-out text, CLINC150's test part and XQuAD."""
    torch.set_num_threads(threads)
    chosen = choose_device(device)
    model, tokenizer = load_demo(demo, chosen)
    perplexity = measure_perplexity(model, tokenizer, read_texts(data), chosen)
    print(
        f"held-out text: perplexity {perplexity.per_token:.2f} per token, {perplexity.per_byte:.3f} per byte "
        f"({perplexity.num_tokens} tokens)"
    )
    intents = read_intents(data)
    for name, pairs in (("validation", intents.val), ("test", intents.test)):
        scores = measure_intents(model, tokenizer, intents, pairs, chosen)
        print(
            f"CLINC150 {name}: in-scope accuracy {scores.in_scope_accuracy:.2%}, "
            f"out-of-scope recall {scores.out_of_scope_recall:.2%}, precision {scores.out_of_scope_precision:.2%}"
        )
    answers = measure_answers(model, tokenizer, read_test_questions(data), chosen)
    print(f"XQuAD (en): exact match {answers.exact_match:.2f}, F1 {answers.f1:.2f}")


def choose_device(name: str) -> torch.device:
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    return torch.device(name)


if __name__ == "__main__":
    app()
