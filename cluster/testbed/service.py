"""`Service`: Ray on every host of a testbed, and the application of a Serve config file on it."""

import os
import secrets
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Self

import httpx
import yaml

from cluster.testbed.host import ROOT, Host
from cluster.testbed.testbed import Testbed

RAY_PORT = 6379
HTTP_PORT = 8000
OBJECT_STORE_BYTES = 80_000_000
START_TIMEOUT_S = 180.0

QUICK_LOSS = {
    "RAY_health_check_initial_delay_ms": "3000",
    "RAY_health_check_period_ms": "1000",
    "RAY_health_check_timeout_ms": "1000",
    "RAY_health_check_failure_threshold": "5",
}
"""How soon Ray's GCS takes a host that has fallen silent for dead; by its defaults it is much later."""

_BIN = Path(sys.executable).parent


class Service:
    """Up and ready when it is entered. It ends with its testbed: there is no other way to stop it."""

    def __init__(
        self, testbed: Testbed, config: Path, log_file: Path, num_cpus: int = 2, environment: Mapping[str, str] = {}
    ) -> None:
        """`num_cpus` is what Ray may reserve on each host. `environment` is that of all of Ray's processes."""
        self._testbed = testbed
        self._config = config
        self._log_file = log_file
        self._num_cpus = num_cpus
        self._environment = {
            "RAY_ADDRESS": f"{testbed.hosts[0].address}:{RAY_PORT}",
            # A token of its own, beside what may lie in ~/.ray: two testbeds don't meet there.
            "RAY_AUTH_MODE": "token",
            "RAY_AUTH_TOKEN": secrets.token_hex(32),
            "PYTHONPATH": os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")])),
            "PYTHONUNBUFFERED": "1",
            **QUICK_LOSS,
            **environment,
        }
        self._serve_run: subprocess.Popen[str] | None = None

    def __enter__(self) -> Self:
        head, *workers = self._testbed.hosts
        head.run(self._ray_start(head, "--head", f"--port={RAY_PORT}", "--include-dashboard=false"), self._environment)
        address = f"--address={head.address}:{RAY_PORT}"
        joining = [
            (worker, worker.popen(self._ray_start(worker, address), self._environment, subprocess.PIPE))
            for worker in workers
        ]
        for worker, process in joining:
            printed, _ = process.communicate(timeout=START_TIMEOUT_S)
            if process.returncode:
                raise RuntimeError(f"ray start on {worker.name} ended with {process.returncode}:\n{printed}")
        with self._log_file.open("w") as log:
            self._serve_run = head.popen([str(_BIN / "serve"), "run", str(self._config)], self._environment, log)
        self._wait_until_ready()
        return self

    def __exit__(self, *_: object) -> None:
        """Nothing to do: see the class."""

    def url(self, index: int) -> str:
        """Of a host's ingress, for clients inside the testbed."""
        return f"http://{self._testbed.hosts[index].address}:{HTTP_PORT}"

    def pipelines(self, index: int = 0) -> list[dict[str, Any]]:
        """As `/status` of that host has them."""
        with self._testbed.client.network():
            response = httpx.get(f"{self.url(index)}/status", timeout=20)
        found: list[dict[str, Any]] = response.raise_for_status().json()["pipelines"]
        return found

    def run_with_ray(self, index: int, *command: str) -> str:
        """What a command prints that is this cluster's client on that host, as `ray status`."""
        return self._testbed.hosts[index].run([str(_BIN / command[0]), *command[1:]], self._environment)

    def _ray_start(self, host: Host, *options: str) -> list[str]:
        return [
            *(str(_BIN / "ray"), "start", f"--node-ip-address={host.address}", f"--num-cpus={self._num_cpus}"),
            *(f"--object-store-memory={OBJECT_STORE_BYTES}", "--disable-usage-stats", *options),
        ]

    def _wait_until_ready(self) -> None:
        """Until each host's ingress says that a pipeline is ready."""
        assert self._serve_run is not None
        deadline = time.monotonic() + START_TIMEOUT_S
        waiting = list(range(len(self._testbed.hosts)))
        with self._testbed.client.network():
            while waiting:
                if self._serve_run.poll() is not None or time.monotonic() > deadline:
                    raise RuntimeError(f"not ready on hosts {waiting}: see {self._log_file}\n{self.output}")
                waiting = [index for index in waiting if not _is_ready(self.url(index))]
                time.sleep(0.2)

    @property
    def output(self) -> str:
        """What `serve run` has shown so far."""
        return self._log_file.read_text() if self._log_file.exists() else ""


def service_config(
    num_hosts: int, directory: Path, source: Path, pipeline: Mapping[str, Any] = {}, **changes: Any
) -> Path:
    """A Serve config file like `source`, for a testbed: an ingress on every host, for clients on others.

    `changes` are to the application's arguments; `pipeline` to single ones of the pipeline's.
    """
    config = yaml.safe_load(source.read_text())
    config["proxy_location"] = "EveryNode"
    config["http_options"] = config.get("http_options", {}) | {"host": "0.0.0.0", "port": HTTP_PORT}
    (application,) = config["applications"]
    args = application.setdefault("args", {})
    args |= changes
    args["pipeline"] = args.get("pipeline", {}) | dict(pipeline)
    args["ingress"] = args.get("ingress", {}) | {"num_replicas": num_hosts}
    path = directory / "testbed.yaml"
    path.write_text(yaml.safe_dump(config))
    return path


def _is_ready(url: str) -> bool:
    try:
        return httpx.get(f"{url}/ready", timeout=5).status_code == 200
    except httpx.TransportError:
        return False
