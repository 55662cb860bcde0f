"""Where the client libraries find the service, and what plain HTTP answers there."""

import os
from collections.abc import Callable, Iterator
from typing import Any

import httpx
import pytest

from tests.serving.service import URL

Post = Callable[..., Any]

MODEL = "gptj-demo"
PROMPT = "The President said"
LOGPROB_TOLERANCE = 1e-4
"""What else is in a batch shows in a log-probability's last digits."""

MESSAGES = [{"role": "system", "content": "Speak."}, {"role": "user", "content": "Who are you?"}]
MESSAGES_AS_PROMPT = "Speak.\n\nUser: Who are you?\n\nAssistant:"


@pytest.fixture(scope="session")
def url(request: pytest.FixtureRequest) -> str:
    """That of the tests' own service, or `$GPTJ_SERVE_TEST_URL`: one with the same checkpoint and chat template."""
    if (given := os.environ.get("GPTJ_SERVE_TEST_URL")) is not None:
        return given
    request.getfixturevalue("service")
    return URL


@pytest.fixture(scope="session")
def post(url: str) -> Iterator[Post]:
    """`post(path, **body)` → what the route answers."""
    with httpx.Client(base_url=url, timeout=120) as client:

        def call(path: str, **body: Any) -> Any:
            response = client.post(path, json=body)
            assert response.status_code == 200, response.text
            return response.json()

        yield call
