"""The config of this package's application in a Serve config file, as `serve run` would take it. Needs no Ray."""

from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError

from gptj_serve.config import PipelineConfig, ServiceConfig, StageConfig
from gptj_serve.errors import ConfigError

IMPORT_PATH = "gptj_serve.serving.app:build"

DEMO = ServiceConfig(pipeline=PipelineConfig(num_stages=2, stage=StageConfig(num_cpus=0.4)))
"""That of deployments/gptj.yaml, which is no part of the package."""


def read_deployment(file: Path) -> ServiceConfig:
    """Raises `ConfigError`, naming the file and the field. Paths in it are relative to the working directory."""
    try:
        document = yaml.safe_load(file.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{file}: can't be read: {getattr(error, 'strerror', None) or error}") from None
    except yaml.YAMLError as error:
        raise ConfigError(f"{file}: is not YAML: {' '.join(str(error).split())}") from None
    applications = document.get("applications") if isinstance(document, dict) else None
    found: list[Any] = applications if isinstance(applications, list) else []
    ours = [entry for entry in found if isinstance(entry, dict) and entry.get("import_path") == IMPORT_PATH]
    if len(ours) != 1:
        raise ConfigError(
            f"{file}: has {len(ours)} applications with import_path {IMPORT_PATH}; a profile is of exactly one"
        )
    try:
        return ServiceConfig.model_validate(ours[0].get("args") or {})
    except ValidationError as error:
        first = error.errors()[0]
        field = ".".join(map(str, ("args", *first["loc"])))
        raise ConfigError(f"{file}: {field}={first['input']!r}: {first['msg']}") from None
