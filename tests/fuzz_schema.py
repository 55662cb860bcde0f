"""Sends a running service requests made up from its OpenAPI schema, and holds each answer against that schema.

    python tests/fuzz_schema.py http://127.0.0.1:8000 --cases 2000

Half of the requests are as the schema wants them, half are not. Found wanting are: a status or content type that the
schema does not tell of, a body or an event that is not as it says, an error of the server's own, and a forbidden
request that is answered all the same. Beside it a golden stream is asked for again and again: the same bytes must come.
"""

import argparse
import contextlib
import re
import sys
import threading
from collections import Counter
from collections.abc import Iterator
from typing import Any

import httpx
import schemathesis
from hypothesis import HealthCheck, Phase, given, settings
from schemathesis import Case, GenerationMode
from schemathesis.checks import not_a_server_error
from schemathesis.specs.openapi import checks

CHECKS = [
    checks.status_code_conformance,
    checks.content_type_conformance,
    checks.response_schema_conformance,
    checks.negative_data_rejection,
]
BUSY = {503, 504}
"""Errors of the server's that it is meant to answer with."""
TIMEOUT_S = 120.0
GOLDEN = {"prompt": "The President said", "max_tokens": 24, "temperature": 0.9, "seed": 7, "stream": True}
GOLDEN_PAUSE_S = 0.2
CHANGING = re.compile(rb'"(id|created)":("[^"]*"|[0-9]+)|\nid: .*')


def fuzz(url: str, num_cases: int, *, derandomize: bool = False) -> Counter[str]:
    """How many requests were answered with which status. Raises a group of all that schemathesis found wrong."""
    schema = schemathesis.openapi.from_url(f"{url}/openapi.json")
    model = served_model(url)
    operations = [result.ok() for result in schema.get_all_operations()]
    wrong, right = GenerationMode.NEGATIVE, GenerationMode.POSITIVE
    plans = [(operation, mode) for operation in operations for mode in ([right, wrong] if operation.body else [right])]
    statuses: Counter[str] = Counter()
    found: list[BaseException] = []
    for operation, mode in plans:
        try:
            statuses += _fuzz_one(url, operation, mode, max(1, num_cases // len(plans)), model, derandomize)
        except BaseExceptionGroup as failures:
            found += failures.exceptions
    if found:
        raise BaseExceptionGroup(f"{len(found)} failures", found)
    return statuses


def served_model(url: str) -> str:
    name: str = httpx.get(f"{url}/v1/models").json()["data"][0]["id"]
    return name


def _fuzz_one(
    url: str, operation: Any, mode: GenerationMode, num_cases: int, model: str, derandomize: bool
) -> Counter[str]:
    statuses: Counter[str] = Counter()

    @settings(
        max_examples=num_cases,
        database=None,
        derandomize=derandomize,
        deadline=None,
        phases=[Phase.generate, Phase.shrink],
        suppress_health_check=list(HealthCheck),
    )
    @given(case=operation.as_strategy(mode))
    def send(case: Case) -> None:
        if mode is GenerationMode.POSITIVE:  # else what is made up here would be all that is looked at
            case.headers.pop("Last-Event-ID", None)
            if operation.path.startswith("/v1/") and isinstance(case.body, dict):
                case.body["model"] = model
        response = case.call(base_url=url, timeout=TIMEOUT_S)
        statuses[f"{mode.value} {response.status_code}"] += 1
        own = [] if response.status_code in BUSY else [not_a_server_error]
        case.validate_response(response, checks=[*own, *CHECKS])

    send()
    return statuses


@contextlib.contextmanager
def golden_stream(url: str) -> Iterator[None]:
    """Ask for the same stream again and again meanwhile. Raises `AssertionError` if it ever came otherwise."""
    model = served_model(url)
    came: Counter[bytes] = Counter()
    done = threading.Event()

    def ask() -> None:
        while not done.is_set() or not came:
            response = httpx.post(f"{url}/v1/completions", json={"model": model, **GOLDEN}, timeout=TIMEOUT_S)
            came[CHANGING.sub(b"", response.content)] += 1
            done.wait(GOLDEN_PAUSE_S)

    thread = threading.Thread(target=ask)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()
    (golden,) = came or [b""]
    assert golden.endswith(b"data: [DONE]\n\n"), came


def main() -> None:
    parser = argparse.ArgumentParser(description="Fuzz a running service by its OpenAPI schema.")
    parser.add_argument("url")
    parser.add_argument("--cases", type=int, default=1000, help="over all routes")
    arguments = parser.parse_args()
    with golden_stream(arguments.url):
        statuses = fuzz(arguments.url, arguments.cases)
    for name, count in sorted(statuses.items()):
        sys.stdout.write(f"{count:6} {name}\n")


if __name__ == "__main__":
    main()
