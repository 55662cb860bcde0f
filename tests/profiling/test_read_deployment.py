from pathlib import Path

import pytest
import yaml

import gptj_serve
from gptj_serve.errors import ConfigError
from gptj_serve.profiling.deployment import DEMO, read_deployment

DEPLOYMENT = Path(gptj_serve.__file__).parent.parent / "deployments" / "gptj.yaml"
OURS = {"name": "gptj", "import_path": "gptj_serve.serving.app:build"}


def test_the_default_is_the_deployment_of_the_demo():
    assert read_deployment(DEPLOYMENT) == DEMO


def test_other_applications_may_be_beside_it(tmp_path: Path):
    args = {"checkpoint": "my-gptj", "pipeline": {"num_stages": 4}}
    document = {"applications": [{"name": "other", "import_path": "other:app"}, OURS | {"args": args}]}
    (tmp_path / "serve.yaml").write_text(yaml.safe_dump(document))
    config = read_deployment(tmp_path / "serve.yaml")
    assert (config.checkpoint, config.pipeline.num_stages) == ("my-gptj", 4)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("applications: [", "is not YAML: "),
        ("just text", "has 0 applications with import_path gptj_serve.serving.app:build"),
        (yaml.safe_dump({"applications": [OURS, OURS]}), "has 2 applications with import_path"),
        (
            yaml.safe_dump({"applications": [OURS | {"args": {"pipeline": {"num_stages": 0}}}]}),
            "args.pipeline.num_stages=0: Input should be greater than 0",
        ),
        (yaml.safe_dump({"applications": [OURS | {"args": {"stages": 2}}]}), "args.stages=2: Extra inputs are not"),
    ],
)
def test_what_cant_be_read_is_named(tmp_path: Path, text: str, message: str):
    file = tmp_path / "serve.yaml"
    file.write_text(text)
    with pytest.raises(ConfigError) as refused:
        read_deployment(file)
    assert str(refused.value).startswith(f"{file}: {message}")


def test_no_file(tmp_path: Path):
    with pytest.raises(ConfigError, match=r"serve.yaml: can't be read: No such file"):
        read_deployment(tmp_path / "serve.yaml")
