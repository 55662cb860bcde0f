"""The application builder refuses what can't be served, before anything is started for it."""

import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from gptj_serve.config import IngressConfig, ServiceConfig
from gptj_serve.errors import GPTJServeError
from gptj_serve.serving import app


@pytest.fixture
def said(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What a `serve run` would be ended with."""
    messages: list[str] = []
    monkeypatch.setattr(app, "end_serve_run", messages.append)
    return messages


@pytest.mark.parametrize(
    ("args", "message"),
    [
        ({"pipeline": {"num_stage": 2}}, "pipeline.num_stage=2: Extra inputs are not permitted"),
        ({"chekpoint": "demo"}, "chekpoint='demo': Extra inputs are not permitted"),
        ({"pipeline": {"num_stages": 0}}, "pipeline.num_stages=0: Input should be greater than 0"),
        (
            {"num_pipelines": 2, "autoscaling": {"max_pipelines": 3}},
            "Value error, num_pipelines=2 and autoscaling contradict each other: set one of them "
            "(autoscaling.initial_pipelines is how many are started first)",
        ),
    ],
)
def test_args_that_are_no_config(args: dict[str, Any], message: str, said: list[str]) -> None:
    with pytest.raises(ValidationError):
        app.BuilderConfig.model_validate(args)
    assert said == [f"the application's args can't be used: {message}"]


@pytest.mark.parametrize(
    ("args", "message"),
    [
        ({"pipeline": {"num_stages": 7}}, "num_stages=7: must be from 1 to the model's 6 layers"),
        ({"pipeline": {"kv_cache": {"num_tokens": 1023}}}, "must hold one sequence of n_positions=1024"),
        ({"checkpoint": "/nowhere"}, "/nowhere: no such checkpoint directory"),
        ({"heads": {"spam": "/nowhere"}}, "/nowhere"),
        ({"ingress": {"api_keys_file": "/nowhere/keys.yaml"}}, "/nowhere/keys.yaml: can't be read: No such file"),
        ({"chat_template": "/nowhere"}, "/nowhere: the chat template can't be read"),
    ],
)
def test_config_that_cannot_be_served(args: dict[str, Any], message: str, said: list[str]) -> None:
    with pytest.raises(GPTJServeError, match=re.escape(message)):
        app.build(app.BuilderConfig.model_validate(args))
    assert len(said) == 1
    assert message in said[0]


def test_tokenizer_larger_than_the_model(tmp_path: Path, demo: Path, said: list[str]) -> None:
    """Its ids would have no embedding."""
    checkpoint = tmp_path / "model"
    shutil.copytree(demo, checkpoint)
    tokenizer = json.loads((checkpoint / "tokenizer.json").read_text())
    extra = tokenizer["added_tokens"][0] | {"id": 5000, "content": "<|extra|>"}
    tokenizer["added_tokens"].append(extra)
    (checkpoint / "tokenizer.json").write_text(json.dumps(tokenizer))
    with pytest.raises(GPTJServeError, match="more than the vocab_size=4096"):
        app.build(app.BuilderConfig(checkpoint=str(checkpoint)))
    assert len(said) == 1


def test_an_ingress_has_room_for_what_it_refuses_and_for_probes() -> None:
    deployment = app._ingress(ServiceConfig(ingress=IngressConfig(max_ongoing_requests=7)), 100)
    assert deployment.max_ongoing_requests == 7 + app.NUM_LOOKING_REQUESTS


def test_an_ingress_asks_for_its_resources() -> None:
    config = ServiceConfig(ingress=IngressConfig(num_cpus=0, resources={"front": 1}))
    options = app._ingress(config, 100).ray_actor_options
    assert (options["num_cpus"], options["resources"]) == (0, {"front": 1})


def test_a_chat_template_that_is_none(tmp_path: Path, said: list[str]) -> None:
    template = tmp_path / "chat.jinja"
    template.write_text("{% for message in messages %}")
    with pytest.raises(GPTJServeError, match=f"{template}: not a chat template: Unexpected end of template"):
        app.build(app.BuilderConfig(chat_template=str(template)))
    assert len(said) == 1


def test_the_demo_can_be_served(said: list[str]) -> None:
    assert app.build(app.BuilderConfig()) is not None
    assert said == []
