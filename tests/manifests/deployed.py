"""Files of deployments/, as they run on a machine with two cores and nothing but the demo checkpoint."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import yaml

from tests.serving.service import ROOT, ServeRun

PORT = 8013
DEMO = ROOT / "gptj_serve" / "demo"


@contextmanager
def deployed(name: str, directory: Path, pipeline: dict[str, Any] | None = None, **args: Any) -> Iterator[ServeRun]:
    """`serve run deployments/NAME.yaml` on another port, on loopback.

    `args`, and `pipeline` below them, are put in place of those of the first application.
    """
    config = yaml.safe_load((ROOT / "deployments" / f"{name}.yaml").read_text())
    config["http_options"] |= {"host": "127.0.0.1", "port": PORT}
    first = config["applications"][0]["args"]
    first |= args
    if pipeline is not None:
        first["pipeline"] |= pipeline
    file = directory / f"{name}.yaml"
    file.write_text(yaml.safe_dump(config))
    run = ServeRun(file, directory / "output.log", port=PORT)
    try:
        prefixes = [application["route_prefix"].rstrip("/") for application in config["applications"]]
        yield run.wait_until_ready(prefixes)
    finally:
        if run.process.poll() is None:
            run.interrupt()
