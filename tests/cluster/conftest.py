import pytest

from cluster.testbed.testbed import missing


@pytest.fixture(scope="session")
def namespaces() -> None:
    """Skips, with the reason, where there can be no testbed."""
    if (reason := missing()) is not None:
        pytest.skip(f"several hosts on one machine: {reason}")
