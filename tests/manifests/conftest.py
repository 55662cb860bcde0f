"""One service with two pipelines, for what watches it and what stands in front of it."""

from collections.abc import Iterator

import pytest

from tests.manifests.deployed import deployed
from tests.serving.service import ServeRun


@pytest.fixture(scope="session")
def highly_available(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServeRun]:
    """As deployments/high-availability.yaml has it; until the last test that uses it is done."""
    with deployed("high-availability", tmp_path_factory.mktemp("available")) as run:
        yield run
