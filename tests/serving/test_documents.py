"""Every command and snippet of README.md and docs/ is run, here or where the table below says."""

import json
import re
from pathlib import Path

import pytest
import yaml
from ray.serve.schema import ServeDeploySchema

from gptj_serve.config import ServiceConfig
from tests.serving.documents import DOCUMENTS, Block, blocks
from tests.serving.service import ROOT, ServeRun

BLOCKS = [block for document in DOCUMENTS for block in blocks(document)]

PICTURES = {"": "plain text", "text": "plain text"}

ELSEWHERE = {
    "pip install": "`.ci/run` does it, in a fresh virtual environment",
    "gptj-serve fit classifier sms_spam.tsv": "takes minutes on the real data; the first block has the same commands",
    "lm_eval ": "needs a data set from the network; tests/serving/clients does the same with files at hand",
    "guidellm ": "tests/serving/clients does it",
    "python -m benchmarks.": "takes minutes; its figures are in the document",
    "python -m cluster.testbed": "needs root; `pytest -m cluster` does the same",
    "pytest -m ": "that is another run of tests",
    "gptj-serve bench deployments/": "takes minutes; tests/simulation measures with few shapes",
    "python -m tests.": "takes minutes to hours; `pytest -m faults` has the short form",
    "RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH": "tests/serving/test_proxy.py tries this hook",
    "docker build": "no image is built in tests; tests/manifests checks its file",
    "kubectl ": "needs a Kubernetes cluster; tests/manifests checks the files",
    "ray get-auth-token": "needs a cloud's account; tests/manifests checks the files",
    "prometheus --config.file": "tests/manifests/test_monitoring.py does it",
    "ray start ": "it would be another cluster on this machine",
    "RAY_AUTH_MODE=token serve deploy": "tests/serving/test_rollout.py makes the call that it makes",
    "gptj-serve convert DOWNLOADED": "tests/test_convert.py does it",
    "# the kernels, compiled": "needs a GPU",
    "python benchmarks/": "takes minutes; its figures are in the document",
}
"""By the beginning of a block: why it is not run here."""

TESTED_IN = {
    "docs/checkpoints.md": "tests/test_cli.py",
    "docs/clients.md": "tests/serving/clients",
    "docs/library.md": "tests/modeling/test_documented_examples.py",
}
"""Documents that need no service, with the tests that run all of their blocks."""

SUBSTITUTIONS: dict[str, dict[str, str]] = {
    "docs/heads.md": {'"spam"': '"tone"'},
    "docs/simulation.md": {"AzureLLMInferenceTrace_conv.csv": "requests.csv"},
    "docs/operations.md": {"10.0.0.5": "127.0.0.1"},
    "docs/profiling.md": {"10.0.0.5": "127.0.0.1", "deployments/mine.yaml": str(ROOT / "deployments" / "gptj.yaml")},
}
"""By document: what stands for the reader's own."""


def write_examples(directory: Path) -> None:
    """The files that docs/heads.md fits heads to, and the requests of docs/profiling.md, with a few rows each."""
    (directory / "requests.csv").write_text("arrived_at,prompt,output\n0,20,4\n0.1,30,3\n")
    rows = [("spam", f"Win prize number {n} now") for n in range(12)] + [("ham", f"See you at {n}") for n in range(12)]
    lines = ["label,text", *(f"{label},{text}" for label, text in rows)]
    (directory / "messages.csv").write_text("\n".join(lines) + "\n")
    paragraphs = [
        {
            "context": f"Anna {n} lives in Paris.",
            "qas": [{"id": str(n), "question": "Where?", "answers": [{"text": "Paris", "answer_start": 16 + n // 10}]}],
        }
        for n in range(12)
    ]
    squad = json.dumps({"version": "1.1", "data": [{"title": "", "paragraphs": [p]} for p in paragraphs]})
    (directory / "squad.json").write_text(squad)


def is_run_here(block: Block) -> bool:
    if block.language in PICTURES or block.document in TESTED_IN:
        return False
    return block.language in ("sh", "python") and not any(map(block.code.startswith, ELSEWHERE))


def test_no_block_is_in_a_language_that_nothing_runs() -> None:
    assert {block.language for block in BLOCKS} <= {"sh", "python", "yaml", "promql", "console", *PICTURES}
    assert {block.document for block in BLOCKS if block.language == "console"} <= set(TESTED_IN)


@pytest.mark.parametrize("beginning", ELSEWHERE)
def test_no_exception_is_stale(beginning: str) -> None:
    assert any(block.code.startswith(beginning) for block in BLOCKS)


def test_pictures_hold_no_commands() -> None:
    words = ("curl ", "pip ", "python ", "gptj-serve ", "import ")
    assert not [str(b) for b in BLOCKS if b.language in PICTURES and any(w in b.code for w in words)]


@pytest.mark.parametrize("block", [block for block in BLOCKS if block.language == "yaml"], ids=str)
def test_configuration(block: Block) -> None:
    """Its `args`, or what would stand below them, are accepted; so is what Serve takes beside them."""
    values = yaml.safe_load(block.code)
    if set(values) <= set(ServeDeploySchema.model_fields):
        ServeDeploySchema.model_validate({"applications": []} | values)
        values = next(iter(values.get("applications", [])), {})
    ServiceConfig.model_validate(values.get("args", values))


@pytest.mark.parametrize("block", [block for block in BLOCKS if block.language == "promql"], ids=str)
def test_queries_ask_for_documented_metrics(block: Block) -> None:
    text = (ROOT / block.document).read_text()
    names = re.findall(r"ray_(gptj_\w+?)(?:_bucket|_total)?\b", block.code)
    assert len(names) >= len(block.code.splitlines())
    assert [name for name in names if f"`{name}`" not in text] == []


@pytest.mark.serve
@pytest.mark.parametrize("block", list(filter(is_run_here, BLOCKS)), ids=str)
def test_block(block: Block, service: ServeRun, tmp_path: Path) -> None:
    write_examples(tmp_path)
    output = block.run(tmp_path, SUBSTITUTIONS.get(block.document, {}))
    assert output.strip(), "it printed nothing"
    assert '"error"' not in output
