"""cluster/launcher, container and systemd, by what reads them: Ray's own checks, hadolint, shellcheck, systemd."""

import os
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml
from packaging.specifiers import SpecifierSet
from packaging.version import Version

from gptj_serve.config import ServiceConfig
from tests.serving.service import ROOT

LAUNCHERS = ["aws", "gcp"]
LAUNCHER = ROOT / "cluster" / "launcher"
CONTAINER = ROOT / "cluster" / "container"
SYSTEMD = ROOT / "cluster" / "systemd"


def launcher(provider: str) -> dict[str, Any]:
    from ray.autoscaler._private.util import prepare_config, validate_config

    config = prepare_config(yaml.safe_load((LAUNCHER / f"{provider}.yaml").read_text()))
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
    assert head["resources"]["CPU"] == 0, "no stage on it"
    assert workers["min_workers"] >= 1
    assert workers["max_workers"] <= config["max_workers"]
    for command in commands(config):
        if "ray start" in command:
            assert "RAY_AUTH_MODE=token" in command
            assert ("--num-cpus=0" in command) is ("--head" in command)
    assert config["file_mounts"]["~/.ray/auth_token"] == "~/.ray/auth_token"


@pytest.mark.parametrize("provider", LAUNCHERS)
def test_a_rollout_gets_a_machine_more_and_leaves_none(provider: str, tmp_path: Path) -> None:
    """Ingresses are where no pipeline is; else it is the deployment for four GPUs."""
    (tmp_path / "gptj").symlink_to(ROOT)
    config = launcher(provider)
    (edit,) = [command for command in commands(config) if command.startswith("sed ")]
    subprocess.run(["/bin/sh", "-c", edit], check=True, env={"HOME": str(tmp_path)}, timeout=30)
    assert "serve deploy ~/deployment.yaml" in " ".join(config["head_start_ray_commands"])
    (application,) = yaml.safe_load((tmp_path / "deployment.yaml").read_text())["applications"]
    (plain,) = yaml.safe_load((ROOT / "deployments" / "gptj-6b-4gpu.yaml").read_text())["applications"]
    ingress = {"num_replicas": 2, "num_cpus": 0, "resources": {"ingress": 1}}
    assert application == plain | {"args": plain["args"] | {"rollout": {"surge": "always"}, "ingress": ingress}}
    ServiceConfig.model_validate(application["args"])
    nodes = config["available_node_types"]
    assert nodes["head"]["resources"]["ingress"] == 2 * ingress["num_replicas"]
    (start,) = [command for command in config["head_start_ray_commands"] if "ray start" in command]
    assert """--resources='{"ingress": 4}'""" in start
    assert nodes["four-t4"]["max_workers"] > nodes["four-t4"]["min_workers"]


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


def test_the_container_has_one_torch_that_the_package_takes() -> None:
    (wanted,) = re.findall(r'"torch(>=[^"]+)"', (ROOT / "pyproject.toml").read_text())
    text = (CONTAINER / "Containerfile").read_text()
    (pinned,) = re.findall(r"^ARG TORCH_VERSION=(\S+)$", text, re.MULTILINE)
    assert Version(pinned) in SpecifierSet(wanted)
    assert '"torch==${TORCH_VERSION}"' in text


CUDA_OF_TORCH, OLDEST_DRIVER = "cu130", 580
"""Of the wheels of torch 2.13 on PyPI, and what CUDA 13 needs."""


def test_drivers_are_new_enough_for_the_torch_that_is_installed() -> None:
    assert f"whl/{CUDA_OF_TORCH} ." in (CONTAINER / "Containerfile").read_text()
    images = re.findall(r"sourceImage: \S+-nvidia-(\d+)$", (LAUNCHER / "gcp.yaml").read_text(), re.MULTILINE)
    assert [int(driver) >= OLDEST_DRIVER for driver in images] == [True]


def test_the_container_is_asked_whether_it_lives() -> None:
    """Below a prefix or on another port by the environment; `/ready` says no while weights are loaded."""
    text = (CONTAINER / "Containerfile").read_text()
    assert "GPTJ_SERVE_HEALTH_URL=http://127.0.0.1:8000/health " in text
    assert re.search(r'^    CMD \["sh", "-c", "exec wget .* \\"\$GPTJ_SERVE_HEALTH_URL\\""\]$', text, re.MULTILINE)


@pytest.mark.manifests
def test_systemd_takes_the_units(tmp_path: Path) -> None:
    """With commands that there are, in place of the service's own."""
    for unit in SYSTEMD.glob("*.service"):
        text = unit.read_text().replace("/opt/gptj-serve/bin/serve", shutil.which("true"))
        (tmp_path / unit.name).write_text(text.replace("/usr/local/sbin/gptj-serve-watch", shutil.which("true")))
    units = sorted(tmp_path.iterdir())
    assert [unit.name for unit in units] == ["gptj-serve-watch.service", "gptj-serve.service"]
    process = subprocess.run(["systemd-analyze", "verify", *units], capture_output=True, text=True, timeout=60)
    ours = [line for line in process.stderr.splitlines() if "gptj-serve" in line]
    assert (process.returncode, ours) == (0, [])


@pytest.mark.manifests
def test_the_unit_gives_the_service_few_rights() -> None:
    """systemd's own measure of exposure, from 0 to 10: below 4, of which the network is most."""
    command = ["systemd-analyze", "security", "--offline=true", "--threshold=40", SYSTEMD / "gptj-serve.service"]
    process = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert process.returncode == 0, process.stdout[-2000:]


def settings(unit: str) -> dict[str, list[str]]:
    """Of a unit's file, by name; several of a name are several."""
    found: dict[str, list[str]] = {}
    for name, value in re.findall(r"^(\w+)=(.*)$", (SYSTEMD / unit).read_text(), re.MULTILINE):
        found.setdefault(name, []).append(value)
    return found


def test_prometheus_may_read_rays_list_and_nobody_rays_token() -> None:
    """Ray opens both plainly, so that the unit's mask decides; Debian's Prometheus has a /tmp of its own."""
    unit = settings("gptj-serve.service")
    (mask,) = (int(value, 8) for value in unit["UMask"])
    assert 0o666 & ~mask == 0o640
    assert (unit["StateDirectory"], unit["StateDirectoryMode"]) == (["gptj-serve"], ["0700"]), "~/.ray/auth_token"
    assert unit["WorkingDirectory"] == ["/var/lib/gptj-serve"]
    to_do = (ROOT / "cluster" / "monitoring" / "prometheus.yml").read_text()
    assert "--groups gptj-serve prometheus" in to_do
    assert "PrivateTmp=no" in to_do


def test_the_unit_leaves_devices_and_lost_processes_to_the_service() -> None:
    unit = settings("gptj-serve.service")
    assert not unit.keys() & {"ProtectClock", "PrivateDevices", "DevicePolicy", "DeviceAllow"}, "they hide GPUs"
    assert "MemoryHigh" not in unit, "below the 95 % at which Ray ends one process, it slows down all"
    assert unit["OOMPolicy"] == ["continue"]


def test_the_watch_goes_where_the_service_goes() -> None:
    assert "gptj-serve-watch.service" in settings("gptj-serve.service")["Wants"]
    watch = settings("gptj-serve-watch.service")
    assert watch["PartOf"] == watch["After"] == ["gptj-serve.service"], "a restart begins the time to start anew"
    assert watch["ExecStart"] == ["/usr/local/sbin/gptj-serve-watch"]


@pytest.mark.manifests
def test_scripts_are_sound() -> None:
    shellcheck((SYSTEMD / "gptj-serve-watch").read_text())
    shellcheck((ROOT / ".ci" / "run").read_text())


LOST, LATE, NO_CURL = 7, 28, 127
RESTART = "systemctl --no-block try-restart gptj-serve.service"


@pytest.mark.parametrize(
    ("answers", "is_restarted"),
    [
        ([(0, 200)] * 20, False),
        ([(LOST, 0)] * 6, True),
        ([(LATE, 0)] * 6, True),
        ([(LATE, 0), (LOST, 0)] * 3, True),
        ([(LATE, 0)] * 5 + [(0, 503)] + [(LATE, 0)] * 5, False),
        ([(0, 503)] * 20, False),
        ([(0, 500)] * 20, False),
    ],
)
def test_the_watch_restarts_what_does_not_answer_for_a_minute(
    answers: list[tuple[int, int]], is_restarted: bool, tmp_path: Path
) -> None:
    calls, _ = watched(tmp_path, answers)
    asked = ["curl", "sleep 10"] * len(answers)
    assert calls[0] == "sleep 300"
    assert calls[1:] == [*asked, *([RESTART, "sleep 300"] if is_restarted else ["curl"])]


@pytest.mark.parametrize(
    ("answer", "told"), [((0, 404), "must be that of a /health"), ((NO_CURL, 0), "curl ended with 127")]
)
def test_the_watch_ends_where_it_can_not_tell(answer: tuple[int, int], told: str, tmp_path: Path) -> None:
    calls, output = watched(tmp_path, [answer])
    assert calls == ["sleep 300", "curl"]
    assert told in output


def watched(directory: Path, answers: list[tuple[int, int]]) -> tuple[list[str], str]:
    """The commands of the watch, as long as `curl` has an answer: its exit status and HTTP's. They only take note."""
    record = directory / "calls"
    (directory / "answers").write_text("".join(f"{code} {status}\n" for code, status in answers))
    end = "kill $PPID"
    scripts = {
        "curl": f"""echo curl >> {record}
            read -r code status <<< "$(sed -n "$(grep -c curl {record})p" {directory / "answers"})"
            if [ -z "$code" ]; then {end}; fi
            printf %s "$status"
            exit "$code\"""",
        "sleep": f"""echo "sleep $1" >> {record}
            if [ "$(grep -c systemctl {record})" = 1 ]; then {end}; fi""",
        "systemctl": f'echo "systemctl $*" >> {record}',
    }
    for name, script in scripts.items():
        (directory / name).write_text(f"#!/bin/bash\n{script}\n")
        (directory / name).chmod(0o755)
    process = subprocess.run(
        [SYSTEMD / "gptj-serve-watch"],
        env={"PATH": f"{directory}:{os.environ['PATH']}"},
        capture_output=True,
        text=True,
        timeout=30,
    )
    return record.read_text().splitlines(), process.stderr
