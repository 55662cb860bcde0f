"""Whose replicas count, by the names of Serve's actors; no cluster."""

from collections.abc import Callable

import pytest
from ray.serve._private import application_state
from ray.serve._private.common import DeploymentID, ReplicaID

from gptj_serve.serving.serve_run import application_being_built, num_replicas

NAMES = [
    ReplicaID(unique_id, DeploymentID(deployment, application)).to_full_id_str()
    for unique_id, deployment, application in (
        ("1", "Pipeline", "gptj"),
        ("2", "Pipeline", "gptj"),
        ("3", "Ingress", "gptj"),
        ("4", "Pipeline", "gptj-2"),
        ("5", "Pipeline", "Pipeline"),
    )
]


@pytest.mark.parametrize(
    ("deployment", "application", "num"),
    [("Pipeline", "gptj", 2), ("Ingress", "gptj", 1), ("Pipeline", "gptj-2", 1), ("Pipeline", None, 4)],
)
def test_replicas_of_other_applications_do_not_count(deployment: str, application: str | None, num: int) -> None:
    assert num_replicas(NAMES, deployment, application) == num


def test_a_builder_finds_out_for_which_application_it_is_called() -> None:
    assert application_being_built() is None

    def build_serve_application(import_path: str, name: str, builder: Callable[[], str | None]) -> str | None:
        return builder()

    assert build_serve_application("gptj_serve.serving.app:build", "gptj", application_being_built) == "gptj"


def test_serve_still_calls_builders_from_where_the_name_is() -> None:
    code = application_state.build_serve_application._function.__code__
    assert code.co_name == "build_serve_application"
    assert "name" in code.co_varnames[: code.co_argcount]
