"""The service from another Ray job: a task, an actor that streams, and a stream that ends early.

Needs `ray[serve]` alone, and on the same cluster a service (`serve run deployments/gptj.yaml`):

    python examples/ray_task.py "The President said"
"""

import sys
from collections.abc import Iterator
from typing import Any

import ray
from ray import serve


@ray.remote(num_cpus=0)
def classify(texts: list[str]) -> list[str]:
    """The likeliest label of each text. A request takes up to 64; methods and bodies are those of the HTTP routes."""
    gptj = serve.get_app_handle("gptj")
    answers = gptj.classify.remote({"inputs": texts, "parameters": {"top_k": 1}}).result()
    return [labels[0]["label"] for labels in answers]


@ray.remote(num_cpus=0)
class Writer:
    """Keeps its handle, and writes on what it is told."""

    def __init__(self) -> None:
        self._gptj = serve.get_app_handle("gptj")

    def write(self, text: str, max_new_tokens: int) -> Iterator[str]:
        """Piece by piece."""
        for event in self._stream(text, max_new_tokens):
            yield event["token"]["text"]

    def first_sentence(self, text: str) -> str:
        """Whoever has read enough cancels: the service then drops the request and frees what it held."""
        stream = self._stream(text, 500)
        written = ""
        for event in stream:
            written += event["token"]["text"]
            if "." in written:
                stream.cancel()
                break
        return written.partition(".")[0] + "."

    def _stream(self, text: str, max_new_tokens: int) -> Any:
        request = {"inputs": text, "parameters": {"max_new_tokens": max_new_tokens}}
        return self._gptj.options(stream=True).generate_stream.remote(request)


def main(prompt: str) -> None:
    print(ray.get(classify.remote(["how much money is in my account", "wake me up at seven", "tell me a joke"])))
    writer = Writer.remote()
    print(prompt, end="")
    for piece in writer.write.remote(prompt, 20):
        print(ray.get(piece), end="", flush=True)
    print()
    print(prompt + ray.get(writer.first_sentence.remote(prompt)))
    try:
        ray.get(classify.remote([""]))
    except ValueError as error:  # what a route would answer with 422
        print(str(error).strip().splitlines()[-1])


if __name__ == "__main__":
    ray.init(address="auto", log_to_driver=False)
    main(sys.argv[1] if len(sys.argv) > 1 else "The President said")
