"""Sends a running service requests made up from its OpenAPI schema, and holds each answer against that schema.

    python tests/serving/fuzz_schema.py http://127.0.0.1:8000 --cases 2000

Half of the requests are as the schema wants them, half are not. Found wanting are: a status or content type that the
schema does not tell of, a body that is not as it says, a 500, and a request that the schema forbids and that is answered
all the same. Beside it a stream of tokens is asked for again and again: it must come with the same bytes each time.
"""

import argparse
import itertools
import json
import sys
import threading
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager

import httpx
import schemathesis
from hypothesis import HealthCheck, Phase, Verbosity, given, settings
from schemathesis import Case, GenerationMode
from schemathesis.checks import not_a_server_error
from schemathesis.specs.openapi.checks import (
    content_type_conformance,
    negative_data_rejection,
    response_schema_conformance,
    status_code_conformance,
)

CHECKS = [
    not_a_server_error,
    status_code_conformance,
    content_type_conformance,
    response_schema_conformance,
    negative_data_rejection,
]
TIMEOUT_S = 120.0
BUSY = {429, 503, 504}
"""Server errors that are answers."""


def fuzz(url: str, num_cases: int, seed: int = 0) -> Counter[str]:
    """How many requests were answered with which status. Raises what schemathesis found, which is a group of failures."""
    schema = schemathesis.openapi.from_url(f"{url}/openapi.json")
    operations = [result.ok() for result in schema.get_all_operations()]
    statuses: Counter[str] = Counter()
    per_operation = max(1, num_cases // (2 * len(operations)))
    for operation, mode in itertools.product(operations, GenerationMode):

        @settings(
            max_examples=per_operation,
            database=None,
            deadline=None,
            derandomize=False,
            phases=[Phase.generate],
            suppress_health_check=list(HealthCheck),
            verbosity=Verbosity.quiet,
        )
        @given(case=operation.as_strategy(mode))
        def send(case: Case) -> None:
            response = case.call(base_url=url, timeout=TIMEOUT_S)
            statuses[f"{mode.value} {response.status_code}"] += 1
            checks = [check for check in CHECKS if response.status_code not in BUSY or check is not not_a_server_error]
            case.validate_response(response, checks=checks)

        send()
    return statuses
