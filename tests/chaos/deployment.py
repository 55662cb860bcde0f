"""The deployment that faults are tried on: two of everything, and pools so small that sequences are preempted."""

from pathlib import Path
from typing import Any

import yaml

from tests.serving.service import ROOT

REPLAY_TIMEOUT_S = 60.0
"""A request that gets no further for this time is refused. No fault that the service recovers from lasts so long."""


def chaos_config(directory: Path, port: int = 8000, **changes: Any) -> Path:
    """Its Serve config file; `changes` are those of the application's arguments."""
    config = yaml.safe_load((ROOT / "deployments" / "gptj.yaml").read_text())
    config["http_options"]["port"] = port
    pipeline = config["applications"][0]["args"]["pipeline"]
    pipeline |= {"step_timeout_s": 5.0, "kv_cache": {"num_tokens": 2048}, "engine_num_cpus": 0.05}
    pipeline["stage"]["num_cpus"] = 0.2
    config["applications"][0]["args"] |= {
        "num_pipelines": 2,
        "ingress": {"num_replicas": 2, "num_cpus": 0.05, "replay_timeout_s": REPLAY_TIMEOUT_S},
    } | changes
    path = directory / "chaos.yaml"
    path.write_text(yaml.safe_dump(config))
    return path
