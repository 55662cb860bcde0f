"""cluster/launcher, container and systemd, by what reads them: Ray's own checks, hadolint, shellcheck, systemd."""

import os
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.serving.service import ROOT

LAUNCHERS = ["aws", "gcp"]
CONTAINER = ROOT / "cluster" / "container"
SYSTEMD = ROOT / "cluster" / "systemd"


def launcher(provider: str) -> dict[str, Any]:
    from ray.autoscaler._private.util import prepare_config, validate_config

    config = prepare_config(yaml.safe_load((ROOT / "cluster" / "launcher" / f"{provider}.yaml").read_text()))
    validate_config(config)
    return config


def commands(config: dict[str, Any]) -> list[str]:
    keys = ("setup_commands", "head_start_ray_commands", "worker_start_ray_commands")
    return [command for key in keys for command in config[key]]


def shellcheck(script: str) -> None:
    # SC1090, SC1091: it can't follow what is sourced
    process = subprocess.run(
        ["shellcheck", "-e", "SC1090,SC1091", "-"], input=script, capture_output=True, text=True, timeout=60
    )
    assert process.returncode == 0, process.stdout


@pytest.mark.parametrize("provider", LAUNCHERS)
def test_ray_takes_the_launchers_file(provider: str) -> None:
    config = launcher(provider)
    head, workers = config["available_node_types"]["head"], config["available_node_types"]["four-t4"]
    assert head["resources"] == {"CPU": 0}, "no request is lost with it"
    assert workers["min_workers"] >= 1
    assert workers["max_workers"] <= config["max_workers"]
    for command in commands(config):
        if "ray start" in command:
            assert "RAY_AUTH_MODE=token" in command
            assert ("--num-cpus=0" in command) is ("--head" in command)
    (deployed,) = re.findall(r"serve deploy ~/gptj/(\S+)", " ".join(commands(config)))
    assert (ROOT / deployed).is_file()
    assert config["file_mounts"]["~/.ray/auth_token"] == "~/.ray/auth_token"


@pytest.mark.manifests
@pytest.mark.parametrize("provider", LAUNCHERS)
def test_the_launchers_commands_are_sound(provider: str) -> None:
    shellcheck("#!/bin/bash\n{\n" + "\n".join(commands(launcher(provider))) + "\n}\n")


@pytest.mark.manifests
def test_the_container_file_is_sound() -> None:
    process = subprocess.run(["hadolint", CONTAINER / "Containerfile"], capture_output=True, text=True, timeout=60)
    assert process.returncode == 0, process.stdout


def test_the_container_gets_all_that_it_copies_and_runs_as_nobody_special() -> None:
    text = (CONTAINER / "Containerfile").read_text()
    kept = re.findall(r"^!(.+)$", (CONTAINER / "Containerfile.dockerignore").read_text(), re.MULTILINE)
    sources = re.findall(r"^COPY (?!--)(.+) \S+$", text, re.MULTILINE)
    copied = {name for names in sources for name in names.split()}
    assert copied == set(kept)
    assert all((ROOT / name).exists() for name in kept)
    assert re.findall(r"^USER (.+)$", text, re.MULTILINE) == ["1000:1000"]


def test_the_containers_torch_is_the_packages() -> None:
    (wanted,) = re.findall(r'"(torch>=[^"]+)"', (ROOT / "pyproject.toml").read_text())
    assert f"'{wanted}'" in (CONTAINER / "Containerfile").read_text()


@pytest.mark.manifests
def test_systemd_takes_the_units(tmp_path: Path) -> None:
    """With a command that there is, in place of the service's own."""
    for unit in SYSTEMD.iterdir():
        (tmp_path / unit.name).write_text(unit.read_text().replace("/opt/gptj-serve/bin/serve", shutil.which("true")))
    units = sorted(tmp_path.iterdir())
    assert [unit.suffix for unit in units] == [".service", ".timer", ".service"]
    process = subprocess.run(["systemd-analyze", "verify", *units], capture_output=True, text=True, timeout=60)
    ours = [line for line in process.stderr.splitlines() if "gptj-serve" in line]
    assert (process.returncode, ours) == (0, [])


@pytest.mark.manifests
def test_the_unit_gives_the_service_few_rights() -> None:
    """systemd's own measure of exposure, from 0 to 10: below 4, of which the network is most."""
    command = ["systemd-analyze", "security", "--offline=true", "--threshold=40", SYSTEMD / "gptj-serve.service"]
    process = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert process.returncode == 0, process.stdout[-2000:]


def watch_script() -> str:
    (script,) = re.findall(r"^ExecStart=/bin/sh -c '(.*)'$", (SYSTEMD / "gptj-serve-watch.service").read_text(), re.M)
    return f"#!/bin/sh\n{script}\n"


@pytest.mark.manifests
def test_scripts_are_sound() -> None:
    shellcheck(watch_script())
    shellcheck((ROOT / ".ci" / "run").read_text())


@pytest.mark.parametrize(
    ("num_failures", "calls"),
    [
        (0, ["curl"]),
        (2, ["curl", "sleep 10", "curl", "sleep 10", "curl"]),
        (6, ["curl", "sleep 10"] * 6 + ["systemctl restart gptj-serve.service"]),
    ],
)
def test_the_watch_restarts_what_is_not_ready_for_a_minute(num_failures: int, calls: list[str], tmp_path: Path) -> None:
    """With commands of its own that only take note."""
    record = tmp_path / "calls"
    scripts = {
        "curl": f'echo curl >> {record}; [ "$(grep -c curl {record})" -gt {num_failures} ]',
        "sleep": f'echo "sleep $1" >> {record}',
        "systemctl": f'echo "systemctl $*" >> {record}',
    }
    for name, script in scripts.items():
        (tmp_path / name).write_text(f"#!/bin/sh\n{script}\n")
        (tmp_path / name).chmod(0o755)
    path = f"{tmp_path}:{os.environ['PATH']}"
    subprocess.run(["/bin/sh", "-c", watch_script()], check=True, env={"PATH": path}, capture_output=True, timeout=30)
    assert record.read_text().splitlines() == calls
