"""lm-evaluation-harness's `local-completions` over the service says what its `hf` backend, transformers, says."""

from pathlib import Path

import pytest

from tests.serving.clients import environments
from tests.serving.clients.conftest import LOGPROB_TOLERANCE

pytestmark = [pytest.mark.serve, pytest.mark.clients, pytest.mark.timeout(900)]

TASKS = Path(__file__).parent / "lm_eval_tasks"
PERPLEXITY_TOLERANCE = 1e-3  # relative

TOKEN_IDS, TEXTS, TOKENIZER = "token ids", "texts", "the service's tokenizer"
RUNS = {
    "gptj_last_word": [TOKEN_IDS, TEXTS],
    "gptj_last_word_generated": [TOKEN_IDS, TEXTS, TOKENIZER],
    "gptj_next_sentence": [TOKEN_IDS],
    "gptj_pages": [TOKEN_IDS, TOKENIZER],
}


@pytest.fixture(scope="module")
def runs(url: str, demo: Path) -> dict:
    return environments.run("lm_eval", "lm_eval_runs.py", url, str(demo), str(TASKS), timeout_s=800)


@pytest.fixture(params=[(task, run) for task, names in RUNS.items() for run in names], ids=": ".join)
def compared(runs: dict, request: pytest.FixtureRequest) -> tuple[str, dict, dict]:
    """The task; what transformers says of it; what the service does."""
    task, run = request.param
    return task, *({part: runs[name][part][task] for part in ("results", "answers")} for name in ("transformers", run))


def test_figures(compared: tuple[str, dict, dict]) -> None:
    task, expected, actual = compared
    figures = {name: value for name, value in expected["results"].items() if isinstance(value, float)}
    assert len(figures) > 0
    for name, value in figures.items():
        tolerance = {"rel": PERPLEXITY_TOLERANCE} if "perplexity" in name else {"abs": 1e-6}
        assert actual["results"][name] == pytest.approx(value, **tolerance), f"{task}: {name}"


def test_answers(compared: tuple[str, dict, dict]) -> None:
    """Each one: texts and greedy flags are equal, log-likelihoods too but for their last digits."""
    task, expected, actual = compared
    assert len(expected["answers"]) == (12 if task == "gptj_pages" else 100)
    if task == "gptj_last_word_generated":
        assert actual["answers"] == expected["answers"]
        return
    for answer, other in zip(actual["answers"], expected["answers"], strict=True):
        for (response,), (other_response,) in zip(_choices(answer), _choices(other), strict=True):
            loglikelihood, *is_greedy = response
            other_loglikelihood, *other_is_greedy = other_response
            assert loglikelihood == pytest.approx(other_loglikelihood, rel=1e-5, abs=LOGPROB_TOLERANCE)
            assert is_greedy == other_is_greedy


def _choices(answer: list) -> list:
    """Of each choice its responses, each a list."""
    return [[response if isinstance(response, list) else [response] for response in choice] for choice in answer]


def test_they_are_not_all_alike(runs: dict) -> None:
    """So that equal figures mean something."""
    flags = [is_greedy for (((_, is_greedy),),) in runs["transformers"]["answers"]["gptj_last_word"]]
    assert 0 < sum(flags) < len(flags)
    texts = {text for ((text,),) in runs["transformers"]["answers"]["gptj_last_word_generated"]}
    assert len(texts) > 50
