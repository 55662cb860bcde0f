"""A batch job over the service's handle, with Ray Data: classify or continue each row of a file.

Needs `ray[data,serve]` alone, and on the same cluster a service (`serve run deployments/gptj.yaml`):

    python examples/ray_data.py --input requests.jsonl --output labels.jsonl
    python examples/ray_data.py --task generate --rows 200 --output texts.jsonl

Each line of the input is an object with a "text". Without an input, it makes up its rows.
"""

import argparse
import json
import time
from collections import deque
from pathlib import Path
from typing import Any

import ray
from ray import serve

ROWS_PER_REQUEST = 64
"""The service's `max_batch_inputs`; one item per row would cost more on its way than in the model."""

Batch = dict[str, Any]


class Caller:
    """One of Ray Data's actors: has at most `max_in_flight` requests at the service, and waits for the oldest."""

    def __init__(self, task: str, model: str, max_in_flight: int) -> None:
        self._model = model
        self._gptj = serve.get_app_handle("gptj")
        self._call = {"classify": self._classify, "generate": self._generate}[task]
        self._read = {"classify": read_labels, "generate": read_texts}[task]
        self._max_in_flight = max_in_flight

    def __call__(self, batch: Batch) -> Batch:
        texts = list(map(str, batch["text"]))
        results: list[Any] = []
        in_flight: deque[Any] = deque()
        for start in range(0, len(texts), ROWS_PER_REQUEST):
            if len(in_flight) == self._max_in_flight:
                results += self._read(in_flight.popleft().result())
            in_flight.append(self._call(texts[start : start + ROWS_PER_REQUEST]))
        for response in in_flight:
            results += self._read(response.result())
        return batch | {name: [result[name] for result in results] for name in results[0]}

    def _classify(self, texts: list[str]) -> Any:
        return self._gptj.classify.remote({"inputs": texts, "parameters": {"top_k": 1}})

    def _generate(self, texts: list[str]) -> Any:
        request = {"model": self._model, "prompt": texts, "max_tokens": 16, "temperature": 0}
        return self._gptj.complete.remote(request)


def read_labels(answers: Any) -> list[dict[str, Any]]:
    return [labels[0] for labels in answers]


def read_texts(answer: Any) -> list[dict[str, Any]]:
    return [{"continued": choice["text"]} for choice in answer["choices"]]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--task", choices=["classify", "generate"], default="classify")
    parser.add_argument("--model", default="gptj-demo", help="the service's name for it; generate says it")
    parser.add_argument("--input", type=Path, help="JSON lines with a text each")
    parser.add_argument("--output", type=Path, required=True, help="JSON lines: the rows and what the service said")
    parser.add_argument("--rows", type=int, default=10_000, help="at most so many")
    parser.add_argument("--max-in-flight", type=int, default=4, help=f"requests of {ROWS_PER_REQUEST} rows")
    options = parser.parse_args()

    ray.init(address="auto")
    ray.data.DataContext.get_current().execution_options.preserve_order = True
    rows = read_rows(options.input, options.rows)
    answered = rows.map_batches(
        Caller,
        fn_constructor_args=(options.task, options.model, options.max_in_flight),
        batch_size=ROWS_PER_REQUEST * options.max_in_flight * 4,
        concurrency=1,  # actors; the service is one, and `max_in_flight` keeps it busy
        num_cpus=0.1,
    )
    began, num_done = time.perf_counter(), 0
    with options.output.open("w", encoding="utf-8") as output:
        for row in answered.iter_rows():
            output.write(json.dumps(row, ensure_ascii=False, default=float) + "\n")
            num_done += 1
            if num_done % 1000 == 0:
                print(f"{num_done} rows, {num_done / (time.perf_counter() - began):.0f} rows/s", flush=True)
    print(f"{num_done} rows in {time.perf_counter() - began:.1f} s")


def read_rows(file: Path | None, limit: int) -> ray.data.Dataset:
    if file is not None:
        return ray.data.read_json(str(file.resolve()), ray_remote_args={"num_cpus": 0.1}).limit(limit)
    return ray.data.from_items([{"text": f"how much money is in account {number}"} for number in range(limit)])


if __name__ == "__main__":
    main()
