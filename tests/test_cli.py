"""The command line as people use it, and the commands of docs/checkpoints.md."""

import json
import re
import shlex
import shutil
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from safetensors.torch import load_file

import gptj_serve
from gptj_serve.cli import main
from gptj_serve.model.checkpoint import SINGLE_FILE, Checkpoint

DOCS = Path(gptj_serve.__file__).parent.parent / "docs"


class Outcome(NamedTuple):
    status: int
    out: str
    err: str


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]):
    def run(*arguments: object) -> Outcome:
        with pytest.raises(SystemExit) as ended:
            main([str(argument) for argument in arguments])
        captured = capsys.readouterr()
        return Outcome(ended.value.code or 0, captured.out, captured.err)

    return run


@pytest.fixture
def pickled(tiny_gptj, tmp_path: Path) -> Path:
    directory = tmp_path / "pickled"
    directory.mkdir()
    shutil.copy(tiny_gptj() / "config.json", directory)
    torch.save(load_file(tiny_gptj() / SINGLE_FILE), directory / "pytorch_model.bin")
    return directory


def test_help_names_the_commands(run):
    outcome = run("--help")
    assert outcome.status == 0
    for command in ("convert", "plan", "fit", "profile", "status"):
        assert command in outcome.out


def test_convert(run, pickled: Path, tmp_path: Path):
    outcome = run("convert", pickled, tmp_path / "new", "--dtype", "bfloat16", "--max-shard-mb", "1")
    assert outcome.status == 0, outcome.err
    assert str(tmp_path / "new") in outcome.out
    assert "100%" in outcome.err  # the progress bar
    assert Checkpoint.open(tmp_path / "new").stored_dtype == "BF16"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["convert", "nowhere", "new"], "nowhere: no such checkpoint directory"),
        (["convert", ".", "."], "is the source itself"),
        (["plan"], "either a checkpoint directory or --config"),
        (["plan", "nowhere"], "nowhere: no such checkpoint directory"),
        (["plan", "a", "--config", "gpt-j-6b"], "either a checkpoint directory or --config"),
        (["plan", "--config", "gpt-5"], "--config='gpt-5': neither a file nor one of gpt-j-6b"),
        (["plan", "--config", "gpt-j-6b", "--stages", "29"], "num_stages=29"),
        (["plan", "--config", "gpt-j-6b", "--context", "4096"], "context=4096"),
        (["plan", "--config", "gpt-j-6b", "--device", "voodoo"], "--device='voodoo': none of cpu, gpu, t4"),
        (
            ["plan", "--config", "gpt-j-6b", "--device", "t4", "--quantization", "fp8"],
            "has compute capability 7.5, and fp8 needs 8.9",
        ),
        (["plan", "--config", "gpt-j-6b", "--device", "cpu", "--quantization", "fp8"], "is for GPUs"),
    ],
    ids=" ".join,
)
def test_errors_are_one_line(run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, arguments: list[str], message: str):
    monkeypatch.chdir(tmp_path)
    outcome = run(*arguments)
    assert outcome.status == 1
    assert outcome.err.startswith("gptj-serve: ")
    assert outcome.err.count("\n") == 1
    assert message in outcome.err


def test_a_pickle_is_pointed_to_convert(run, pickled: Path):
    outcome = run("plan", pickled)
    assert outcome.status == 1
    assert f"gptj-serve convert {pickled}" in outcome.err


def test_plan_as_json(run):
    outcome = run("plan", "--config", "gpt-j-6b", "--stages", 2, "--device-memory-gib", 24, "--json")
    plan = json.loads(outcome.out)
    assert outcome.status == 0
    assert plan["fits"]
    assert plan["num_parameters"] == 6_050_882_784
    assert plan["kv_bytes_per_token"] == 448 * 1024
    assert [stage["layers"] for stage in plan["stages"]] == [[0, 15], [15, 28]]
    assert plan["max_batch_full"] == plan["num_kv_tokens"] // 2048
    assert plan["min_token_latency_s"] is None


def test_plan_that_does_not_fit(run):
    arguments = ["plan", "--config", "gpt-j-6b", "--dtype", "float32", "--device-memory-gib", 16]
    outcome = run(*arguments)
    assert outcome.status == 1
    assert "DOES NOT FIT" in outcome.out
    assert "--dtype bfloat16" in outcome.out
    assert "--stages 2" in outcome.out
    outcome = run(*arguments, "--json")
    assert outcome.status == 1
    assert len(json.loads(outcome.out)["would_fit"]) == 3


def test_plan_of_a_checkpoint_and_of_a_config_file(run, tiny_gptj):
    for arguments in ([tiny_gptj()], ["--config", tiny_gptj() / "config.json"]):
        for device, dtype in (("cpu", "float32"), ("gpu", "bfloat16"), ("t4", "float16"), ("l4", "bfloat16")):
            outcome = run("plan", *arguments, "--stages", 3, "--device", device)
            assert outcome.status == 0, outcome.err
            assert f"in {dtype}" in outcome.out


def test_a_known_gpu_brings_its_memory_and_bandwidth(run):
    told = [
        json.loads(run("plan", "--config", "gpt-j-6b", "--json", *arguments).out)
        for arguments in (["--device", "a10g"], ["--device-memory-gib", 22, "--bandwidth-gb-s", 600])
    ]
    assert told[0] == told[1]
    assert told[0]["min_token_latency_s"] > 0.015
    assert told[0]["stages"][0]["overhead_bytes"].keys() == {"context", "workspace", "graphs", "activations", "logits"}


def test_the_commands_of_the_docs(run, pickled: Path, tmp_path: Path):
    """In the page's order; what it prints below a command must be what that prints."""
    text = (DOCS / "checkpoints.md").read_text(encoding="utf-8")
    commands = re.findall(r"^\$ gptj-serve (.*)\n((?:(?!```|\$ ).*\n)*)", text, re.MULTILINE)
    assert len(commands) >= 4
    assert len(commands) == len(re.findall(r"^\$ ", text, re.MULTILINE))
    for arguments, shown in commands:
        real = arguments.replace("/models/downloaded", str(pickled)).replace("/models/", f"{tmp_path}/")
        outcome = run(*shlex.split(real))
        if shown:
            assert outcome.out.strip() == shown.strip()
            assert outcome.status == ("DOES NOT FIT" in shown)
        else:
            assert outcome.status == 0, outcome.err
