"""lm-eval's figures and answers, by transformers itself and by a service: `lm_eval_runs.py URL CHECKPOINT TASKS`."""

import json
import os
import sys
import tempfile
from typing import Any

import datasets
import torch
from lm_eval import simple_evaluate
from lm_eval.tasks import TaskManager

LAST_WORD = ["gptj_last_word", "gptj_last_word_generated"]
ALL = [*LAST_WORD, "gptj_next_sentence", "gptj_pages"]


def main() -> None:
    url, checkpoint, directory = sys.argv[1:]
    torch.set_num_threads(1)  # the service has the same cores
    completions = {
        "model": "gptj-demo",
        "base_url": f"{url}/v1/completions",
        "tokenizer": checkpoint,
        "tokenizer_backend": "huggingface",
        "max_length": 1024,
    }
    os.chdir(directory)  # the tasks name their files relative to it
    task_manager = TaskManager(include_path=".", include_defaults=False)

    def evaluate(model: str, settings: dict[str, Any], tasks: list[str] = ALL, **options: Any) -> dict[str, Any]:
        made = simple_evaluate(
            model, settings, tasks=tasks, task_manager=task_manager, bootstrap_iters=0, log_samples=True, **options
        )
        answers = {
            task: [sample["resps"] for sample in sorted(samples, key=lambda sample: sample["doc_id"])]
            for task, samples in made["samples"].items()
        }
        return {"results": made["results"], "answers": answers}

    with tempfile.TemporaryDirectory() as cache:
        datasets.config.HF_DATASETS_CACHE = cache
        runs = {
            "transformers": evaluate("hf", {"pretrained": checkpoint, "dtype": "float32"}, device="cpu", batch_size=1),
            "token ids": evaluate("local-completions", completions | {"num_concurrent": 8}),
            "texts": evaluate(
                "local-completions", completions | {"tokenized_requests": False}, LAST_WORD, batch_size=8
            ),
            "the service's tokenizer": evaluate(
                "local-completions",
                completions | {"tokenizer": None, "tokenizer_backend": "auto", "num_concurrent": 8},
                ["gptj_last_word_generated", "gptj_pages"],
            ),
        }
    print(json.dumps(runs))


main()
