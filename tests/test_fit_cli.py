"""`fit classifier` and `fit qa` from the command line: to a head that the service's stages load and answer with."""

import asyncio
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from fakes import small_backend_json, small_tokenizer
from typer.testing import CliRunner, Result

from gptj_serve.api.classification import classify
from gptj_serve.api.huggingface_schemas import ClassifyRequest
from gptj_serve.api.service import Service
from gptj_serve.config import IngressConfig, ServiceConfig
from gptj_serve.engine.kv_blocks import KVBlocks
from gptj_serve.engine.local import LocalEngine
from gptj_serve.engine.scheduler import Scheduler, SchedulerLimits
from gptj_serve.fit.examples import read_texts
from gptj_serve.fit_cli import app
from gptj_serve.model.checkpoint import Checkpoint
from gptj_serve.model.heads import HeadCheckpoint, HeadKind, open_heads
from gptj_serve.pipeline.in_process import InProcessPipeline
from gptj_serve.pipeline.stage_runner import StageRunner, StageSpec
from gptj_serve.tokenizer import Tokenizer

NUM_TEXTS = 240
ANIMALS, PLANTS = ["fox", "dog", "cat", "horse"], ["rose", "oak", "fern", "tulip"]


@pytest.fixture(scope="session")
def checkpoint_dir(tiny_gptj, tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("checkpoint") / "tiny"
    shutil.copytree(tiny_gptj(vocab_size=small_tokenizer().num_token_ids), directory)
    (directory / "tokenizer.json").write_text(small_backend_json())
    return directory


@pytest.fixture
def texts(tmp_path: Path) -> Path:
    """The last word decides; every text is another."""
    rng = np.random.default_rng(0)
    rows = []
    for i in range(NUM_TEXTS):
        label, words = [("animal", ANIMALS), ("plant", PLANTS)][int(rng.random() < 0.4)]
        rows.append({"text": f"{i}: the {words[rng.integers(4)]}", "label": label})
    path = tmp_path / "texts.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def fit(*arguments: Any) -> Result:
    return CliRunner().invoke(app, [*map(str, arguments), "--num-threads", "1"])


def figures(output: Path) -> dict[str, Any]:
    return json.loads((output / "head.json").read_text())["figures"]


def test_classifier(checkpoint_dir: Path, texts: Path, tmp_path: Path):
    output = tmp_path / "kingdom"
    arguments = (
        "classifier", texts, "-o", output, "--checkpoint", checkpoint_dir, "--num-stages", 2, "--pooling", "last",
    )  # fmt: skip
    result = fit(*arguments)
    assert result.exit_code == 0, result.output
    report = figures(output)
    assert report["accuracy"] > 0.95 > 0.75 > report["majority_accuracy"]
    assert report["macro_f1"] > 0.95 > report["majority_macro_f1"]
    assert f"{report['accuracy']}" in result.output
    assert (report["training_examples"], report["held_out_examples"]) == (192, 24)
    head = HeadCheckpoint.open(output, Checkpoint.open(checkpoint_dir))
    assert (head.info.kind, head.info.labels, head.info.name) == (HeadKind.CLASSIFIER, ["animal", "plant"], "kingdom")
    assert head.info.problem_type == "single_label_classification"

    assert "exists already" in fit(*arguments).stderr
    again = fit(*arguments, "--force", "--seed", 0)
    assert again.exit_code == 0, again.output
    np.testing.assert_array_equal(HeadCheckpoint.open(output, Checkpoint.open(checkpoint_dir)).weight, head.weight)


@pytest.mark.parametrize("pooling", ["mean", "last"])
async def test_the_service_answers_as_was_reported(checkpoint_dir: Path, texts: Path, tmp_path: Path, pooling: str):
    output = tmp_path / "kingdom"
    arguments = ("classifier", texts, "-o", output, "--checkpoint", checkpoint_dir, "--pooling", pooling)
    result = await asyncio.to_thread(fit, *arguments)
    assert result.exit_code == 0, result.output
    checkpoint = Checkpoint.open(checkpoint_dir)
    heads = open_heads({"kingdom": output}, checkpoint)
    model = checkpoint.config
    spec = StageSpec(range(model.n_layer), 60, 16, torch.float32, torch.device("cpu"), model.vocab_size)
    pipeline = InProcessPipeline([StageRunner.load(checkpoint, spec, heads)])
    scheduler = Scheduler(SchedulerLimits(1, 64, 128, model.n_positions), KVBlocks(60, 16), frozenset())
    async with LocalEngine(scheduler, pipeline) as engine:
        infos = {name: head.info for name, head in heads.items()}
        config = ServiceConfig(ingress=IngressConfig(max_batch_inputs=NUM_TEXTS))
        service = Service(config, model, checkpoint.heads, Tokenizer.from_directory(checkpoint_dir), engine, infos)
        examples = read_texts(texts).examples
        request = ClassifyRequest(inputs=[example.text for example in examples], model="kingdom")
        answers = await classify(service, request)
    pipeline.close()
    right = [answer[0]["label"] == example.labels[0] for answer, example in zip(answers, examples, strict=True)]
    assert sum(right) / len(right) > 0.95


def test_several_labels_and_a_test_file(checkpoint_dir: Path, texts: Path, tmp_path: Path):
    rows = [json.loads(line) for line in texts.read_text().splitlines()]
    for row in rows:
        row["label"] = [row["label"]] + (["short"] if "fox" in row["text"] or "oak" in row["text"] else [])
    for name, part in (("train.jsonl", rows[40:]), ("test.jsonl", rows[:40])):
        (tmp_path / name).write_text("".join(json.dumps(row) + "\n" for row in part))
    output = tmp_path / "tags"
    result = fit(
        "classifier", tmp_path / "train.jsonl", "--test", tmp_path / "test.jsonl", "-o", output,
        "--checkpoint", checkpoint_dir,
    )  # fmt: skip
    assert result.exit_code == 0, result.output
    report = figures(output)
    assert report["held_out_examples"] == 40
    assert report["macro_f1"] > 0.85 > report["majority_macro_f1"]
    head = HeadCheckpoint.open(output, Checkpoint.open(checkpoint_dir))
    assert head.info.labels == ["animal", "plant", "short"]
    assert head.info.problem_type == "multi_label_classification"


def test_qa(checkpoint_dir: Path, tmp_path: Path):
    """A word after 'the' is the answer: one token's hidden state shows it."""
    rng = np.random.default_rng(0)
    rows = []
    for i in range(120):
        before, after = ("so " * int(rng.integers(1, 6)), " so" * int(rng.integers(1, 6)))
        word = [*ANIMALS, *PLANTS][rng.integers(8)]
        context = f"{i} {before}{word}{after}"
        rows.append(
            {
                "question": "What?",
                "context": context,
                "answers": {"text": [word], "answer_start": [context.index(word)]},
            }
        )
    (tmp_path / "qa.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    output = tmp_path / "reader"
    result = fit("qa", tmp_path / "qa.jsonl", "-o", output, "--checkpoint", checkpoint_dir, "--holdout", 0.2)
    assert result.exit_code == 0, result.output
    report = figures(output)
    assert report["held_out_questions"] == 24
    assert report["exact_match"] > 0.6 > 0.1 > report["baseline_exact_match"]
    assert HeadCheckpoint.open(output, Checkpoint.open(checkpoint_dir)).info.kind is HeadKind.QA


def test_errors_end_with_one_line_and_nothing_written(checkpoint_dir: Path, texts: Path, tmp_path: Path):
    output = tmp_path / "out" / "head"
    common = ("-o", output, "--checkpoint", checkpoint_dir)
    (tmp_path / "empty.jsonl").write_text("")
    (tmp_path / "long.csv").write_text(f"text,label\na,x\n{'very ' * 200}long,y\n")
    (tmp_path / "few.csv").write_text("text,label\na,x\nb,y\n")
    (tmp_path / "other.csv").write_text("text,label\na,animal\nb,stone\n")
    (tmp_path / "long.jsonl").write_text(
        json.dumps({"question": "a " * 300, "context": "", "answers": {"text": [], "answer_start": []}})
    )
    for arguments, message in (
        (("classifier", tmp_path / "empty.jsonl", *common), "empty.jsonl: has no examples"),
        (("classifier", tmp_path / "long.csv", *common), "long.csv:3: the text has"),
        (("classifier", tmp_path / "few.csv", *common), "2 examples leave none for the validation part"),
        (("classifier", texts, "--test", tmp_path / "other.csv", *common), "no training example has the label 'stone'"),
        (("classifier", texts, *common, "--num-stages", 7), "num_stages=7: must be 1 to n_layer=6"),
        (("classifier", texts, "-o", output, "--checkpoint", tmp_path / "none"), "none: no such checkpoint"),
        (("qa", tmp_path / "long.jsonl", *common), "long.jsonl:1: context=''"),
    ):
        result = fit(*arguments)
        assert result.exit_code == 1, result.output
        assert result.stderr.splitlines()[-1].startswith("error: ")
        assert message in result.stderr
        assert not output.exists()
