"""cluster/monitoring: what Prometheus makes of a live service with the config, the alerts and the dashboard."""

import itertools
import json
import math
import re
import subprocess
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
import yaml

from tests.serving.service import ROOT, ServeRun

pytestmark = [pytest.mark.manifests, pytest.mark.timeout(240)]

MONITORING = ROOT / "cluster" / "monitoring"
ALERTS = yaml.safe_load((MONITORING / "alerts.yml").read_text())
RULES = {rule["alert"]: rule["expr"] for group in ALERTS["groups"] for rule in group["rules"]}
DASHBOARD = json.loads((MONITORING / "dashboard.json").read_text())
QUERIES = {
    f"{panel['title']}, {target['refId']}": target["expr"]
    for panel in DASHBOARD["panels"]
    for target in panel.get("targets", [])
}
PROMETHEUS = "http://127.0.0.1:19090"
SETTLING_TIMEOUT_S = 90.0  # Ray exports every ten seconds, and a rate needs two exports that differ

VARIABLES = {"$__rate_interval": "1m", "$model": ".*"}
"""What Grafana puts in their place, with all models chosen."""

UNSEEN = {
    "ray_gptj_preemptions_total",
    "ray_gptj_recoveries_total",
    "ray_gptj_replays_total",
    "ray_gptj_requests_not_finite_total",
    "ray_gptj_drafted_tokens_total",
    "ray_gptj_accepted_draft_tokens_total",
    "ray_node_gpus_utilization",
}
"""Metrics that are only there once something has gone wrong, or where there is a GPU."""


OF_THE_MACHINE = {"NodeMemoryFull", "NodeDiskFull", "FirstTokenSlow", "TokensSlow"}
"""Alerts that a full or busy one rightly has."""


def promtool(*arguments: str | Path) -> str:
    process = subprocess.run(["promtool", *arguments], capture_output=True, text=True, timeout=60)
    assert process.returncode == 0, process.stdout + process.stderr
    return process.stdout


def test_promtool_takes_config_and_rules() -> None:
    assert f"{len(RULES)} rules found" in promtool("check", "config", MONITORING / "prometheus.yml")


def test_alerts_fire_when_they_must_and_only_then() -> None:
    cases = Path(__file__).parent / "alerts_test.yml"
    promtool("test", "rules", cases)
    assert [
        name for name in RULES if cases.read_text().count(f" {name}") + cases.read_text().count(f'"{name}"') == 0
    ] == []


def test_grafana_knows_every_field_of_the_dashboard() -> None:
    """Read and written by Grafana's own model, nothing is lost or changed."""
    from grafana_foundation_sdk.cog.encoder import JSONEncoder
    from grafana_foundation_sdk.cog.plugins import register_default_plugins
    from grafana_foundation_sdk.models.dashboard import Dashboard

    register_default_plugins()
    written = json.loads(JSONEncoder().encode(Dashboard.from_json(DASHBOARD)))
    assert lost(DASHBOARD, written) == []


def lost(before: Any, after: Any, path: str = "dashboard") -> list[str]:
    """Where `after` lacks a value of `before`, or has another."""
    if isinstance(before, dict) and isinstance(after, dict):
        return [where for key in before for where in lost(before[key], after.get(key), f"{path}.{key}")]
    if isinstance(before, list) and isinstance(after, list) and len(before) == len(after):
        return [
            where for i, pair in enumerate(zip(before, after, strict=True)) for where in lost(*pair, f"{path}[{i}]")
        ]
    return [] if before == after else [path]


def test_panels_lie_beside_each_other() -> None:
    """On Grafana's grid of 24 columns, none over another, and all with a datasource and a unit."""
    taken: set[tuple[int, int]] = set()
    for panel in DASHBOARD["panels"]:
        place = panel["gridPos"]
        cells = set(
            itertools.product(range(place["x"], place["x"] + place["w"]), range(place["y"], place["y"] + place["h"]))
        )
        assert max(x for x, _ in cells) < 24
        assert not cells & taken, panel["title"]
        taken |= cells
        if panel["type"] != "row":
            assert panel["fieldConfig"]["defaults"]["unit"]
            assert {target["datasource"]["uid"] for target in panel["targets"]} == {"${datasource}"}
    assert len({panel["id"] for panel in DASHBOARD["panels"]}) == len(DASHBOARD["panels"])


class Load:
    """Requests of all kinds, again and again, so that every rate is above 0."""

    def __init__(self, url: str) -> None:
        self._url = url
        self._stop = threading.Event()
        self._threads = [threading.Thread(target=self._ask) for _ in range(2)]

    def __enter__(self) -> None:
        for thread in self._threads:
            thread.start()

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        for thread in self._threads:
            thread.join()

    def _ask(self) -> None:
        text = {"inputs": "The President said " * 12, "parameters": {"max_new_tokens": 12, "do_sample": True}}
        question = {"question": "Where does Anna live?", "context": "Anna lives in Paris."}
        with httpx.Client(base_url=self._url, timeout=60) as http:
            while not self._stop.wait(0.2):
                http.post("/generate", json=text).raise_for_status()
                http.post("/classify", json={"inputs": "book a flight"}).raise_for_status()
                http.post("/qa", json={"inputs": question}).raise_for_status()


def ask(expression: str) -> list[float]:
    """The values of an instant query."""
    answer = httpx.get(f"{PROMETHEUS}/api/v1/query", params={"query": expression}, timeout=10).json()
    assert answer["status"] == "success", f"{expression}: {answer}"
    return [float(sample["value"][1]) for sample in answer["data"]["result"]]


def with_variables(expression: str) -> str:
    for name, value in VARIABLES.items():
        expression = expression.replace(name, value)
    return expression


def unanswered() -> list[str]:
    """Queries of the dashboard that have no data yet, or no number."""
    answers = {name: ask(with_variables(expression)) for name, expression in QUERIES.items()}
    return [name for name, values in answers.items() if not values or any(map(math.isnan, values))]


@pytest.fixture(scope="module")
def prometheus(highly_available: ServeRun, tmp_path_factory: pytest.TempPathFactory) -> Iterator[list[str]]:
    """As prometheus.yml has it, but asks more often; what the dashboard still lacked when time was up."""
    directory = tmp_path_factory.mktemp("prometheus")
    config = yaml.safe_load((MONITORING / "prometheus.yml").read_text())
    config["global"] = {"scrape_interval": "2s", "evaluation_interval": "2s"}
    config["rule_files"] = [str(MONITORING / "alerts.yml")]
    (directory / "prometheus.yml").write_text(yaml.safe_dump(config))
    command = [
        "prometheus",
        f"--config.file={directory / 'prometheus.yml'}",
        f"--storage.tsdb.path={directory / 'data'}",
    ]
    with (directory / "output.log").open("w") as log:
        process = subprocess.Popen([*command, f"--web.listen-address={PROMETHEUS[7:]}"], stdout=log, stderr=log)
    try:
        with Load(highly_available.url):
            deadline = time.monotonic() + SETTLING_TIMEOUT_S
            missing = ["everything"]
            while missing and time.monotonic() < deadline:
                time.sleep(2)
                assert process.poll() is None, (directory / "output.log").read_text()
                try:
                    missing = unanswered()
                except httpx.TransportError:
                    continue
            yield missing
    finally:
        process.terminate()
        process.wait(30)


@pytest.mark.serve
def test_every_query_of_the_dashboard_has_data(prometheus: list[str]) -> None:
    assert prometheus == []


@pytest.mark.serve
def test_the_dashboards_models_are_those_that_are_served(prometheus: list[str]) -> None:
    (variable,) = [each for each in DASHBOARD["templating"]["list"] if each["type"] == "query"]
    assert variable["query"]["query"] == "label_values(ray_gptj_num_kv_blocks, model)"
    answer = httpx.get(
        f"{PROMETHEUS}/api/v1/label/model/values", params={"match[]": "ray_gptj_num_kv_blocks"}, timeout=10
    )
    assert answer.json()["data"] == ["gptj-demo"]


@pytest.mark.serve
def test_what_the_dashboard_shows_is_so(prometheus: list[str]) -> None:
    assert ask(QUERIES["Pipelines, A"].replace("$model", ".*")) == [2]
    assert ask("sum by (deployment) (ray_serve_deployment_replica_healthy)") == [2, 2]
    (tokens,) = ask("sum(ray_gptj_generated_tokens_total)")
    (requests,) = ask('sum(ray_gptj_requests_total{task="generate", outcome="length"})')
    assert tokens > 0 < requests


@pytest.mark.serve
def test_every_alert_is_evaluated_and_finds_nothing(prometheus: list[str]) -> None:
    """Not even for a moment; pending is not nothing."""
    groups = httpx.get(f"{PROMETHEUS}/api/v1/rules", timeout=10).json()["data"]["groups"]
    rules = {rule["name"]: rule for group in groups for rule in group["rules"]}
    assert set(rules) == set(RULES)
    assert {name: rule["lastError"] for name, rule in rules.items() if rule["health"] != "ok"} == {}
    assert [name for name, rule in rules.items() if rule["state"] != "inactive" and name not in OF_THE_MACHINE] == []


@pytest.mark.serve
@pytest.mark.parametrize("name", RULES)
def test_every_alert_asks_for_metrics_that_there_are(name: str, prometheus: list[str]) -> None:
    metrics = set(re.findall(r"\b(?:ray_\w+|up)\b", RULES[name]))
    assert metrics
    assert [metric for metric in metrics - UNSEEN if not ask(metric)] == []


@pytest.mark.serve
def test_no_series_is_kept_that_nothing_asks_for(prometheus: list[str]) -> None:
    names = httpx.get(f"{PROMETHEUS}/api/v1/label/__name__/values", timeout=10).json()["data"]
    ours = [name for name in names if name.startswith("ray_") and not name.startswith(("ray_gptj_", "ray_node_"))]
    asked = " ".join([*QUERIES.values(), *RULES.values()])
    assert [name for name in ours if name not in asked] == []
