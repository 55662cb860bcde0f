"""Which pipelines an answer may come from, while two versions of the model run."""

import pytest

from gptj_serve.errors import OverloadedError
from gptj_serve.serving.answers import Answers
from gptj_serve.serving.replicas import Replicas
from gptj_serve.types import ModelVersion

OLD, NEW, STRANGE = ModelVersion("text", "old"), ModelVersion("text", "new"), ModelVersion("other text", "old")


def replicas_of(**versions: ModelVersion | None) -> Replicas:
    replicas = Replicas()
    replicas.set_running(versions)
    for replica_id, version in versions.items():
        if version is not None:
            replicas.set_version(replica_id, version)
    return replicas


def test_the_first_event_decides_for_all_sequences_of_a_request() -> None:
    replicas = replicas_of(a=OLD, b=NEW, c=None)
    answers = Answers("text", replicas)
    with answers.sequence("my-request-1") as answer, answers.sequence("my-request-2") as same:
        assert same is answer
        assert answers.unfit(answer) == set()
        assert answers.takes(answer, "b")
        assert not answers.takes(answer, "a")
        assert answers.takes(answer, "b")
        assert answers.unfit(answer) == {"a"}
        with answers.sequence("another-1") as another:
            assert answers.unfit(another) == set()
    with answers.sequence("my-request-3") as later:
        assert answers.unfit(later) == set()


def test_whose_text_is_another_is_never_asked() -> None:
    answers = Answers("text", replicas_of(a=STRANGE, b=OLD))
    with answers.sequence("r-1") as answer:
        assert answers.unfit(answer) == {"a"}
        answers.check_not_stranded(answer)


def test_an_answer_that_nobody_can_go_on_with_ends() -> None:
    replicas = replicas_of(a=OLD)
    answers = Answers("text", replicas)
    with answers.sequence("r-1") as answer:
        assert answers.takes(answer, "a")
        replicas.set_running({"b"})
        answers.check_not_stranded(answer)  # it may be the same
        replicas.set_version("b", NEW)
        assert answers.unfit(answer) == {"b"}
        with pytest.raises(OverloadedError, match="replaced by another version"):
            answers.check_not_stranded(answer)
        replicas.set_running({})
        answers.check_not_stranded(answer)  # one may come


def test_a_sequence_moves_only_to_what_is_known_to_go_on_the_same() -> None:
    replicas = replicas_of(a=OLD, b=NEW, c=None)
    answers = Answers("text", replicas)
    with answers.sequence("r-1") as answer:
        assert answers.others(answer, "a") == set()
        replicas.set_version("c", OLD)
        assert answers.others(answer, "a") == {"c"}


def test_pipelines_that_tell_no_version_are_all_alike() -> None:
    answers = Answers("", replicas_of(a=None, b=None))
    with answers.sequence("r") as answer:
        assert answers.takes(answer, "a")
        assert answers.takes(answer, "b")
        assert answers.unfit(answer) == set()
        assert answers.others(answer, "a") == {"b"}
