"""The examples, as another job on the service's cluster."""

import json
import subprocess
import sys
from pathlib import Path

import httpx
import pytest

from tests.serving.service import ROOT, URL, ServeRun

pytestmark = pytest.mark.serve

NUM_ROWS = 200


def run(script: str, *args: str) -> str:
    completed = subprocess.run(
        [sys.executable, ROOT / "examples" / script, *args], cwd=ROOT, capture_output=True, text=True, timeout=110
    )
    assert completed.returncode == 0, completed.stdout + completed.stderr
    return completed.stdout


def test_ray_task(service: ServeRun) -> None:
    labels, streamed, sentence, refusal = run("ray_task.py", "The President said").strip().splitlines()
    assert labels == "['balance', 'alarm', 'tell_joke']"
    body = {"inputs": "The President said", "parameters": {"max_new_tokens": 20, "return_full_text": True}}
    assert streamed == httpx.post(f"{URL}/generate", json=body, timeout=60).json()["generated_text"]
    assert sentence == streamed.partition(".")[0] + "."
    assert "inputs" in refusal


@pytest.mark.parametrize("task", ["classify", "generate"])
def test_ray_data(service: ServeRun, tmp_path: Path, task: str) -> None:
    texts = [f"how much money is in account {number}" for number in range(NUM_ROWS + 10)]
    source, target = tmp_path / "rows.jsonl", tmp_path / "answers.jsonl"
    source.write_text("".join(json.dumps({"id": index, "text": text}) + "\n" for index, text in enumerate(texts)))
    options = {"--task": task, "--input": source, "--output": target, "--rows": NUM_ROWS, "--max-in-flight": 2}
    output = run("ray_data.py", *[str(part) for pair in options.items() for part in pair])
    assert f"{NUM_ROWS} rows in " in output
    rows = [json.loads(line) for line in target.read_text().splitlines()]
    assert [(row["id"], row["text"]) for row in rows] == list(enumerate(texts[:NUM_ROWS]))
    for row in rows[:: NUM_ROWS // 4]:
        if task == "classify":
            body = {"inputs": row["text"], "parameters": {"top_k": 1}}
            ((label,),) = httpx.post(f"{URL}/classify", json=body, timeout=60).json()
            assert (row["label"], row["score"]) == (label["label"], pytest.approx(label["score"], abs=1e-4))
        else:
            body = {"model": "gptj-demo", "prompt": row["text"], "temperature": 0}
            answer = httpx.post(f"{URL}/v1/completions", json=body, timeout=60).json()
            assert row["continued"] == answer["choices"][0]["text"]
