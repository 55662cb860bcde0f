"""`gptj-serve status`: what a service is doing, as a view that is renewed in place."""

import json
import time
import urllib.error
import urllib.request
from collections.abc import Iterable
from http.client import HTTPException
from pathlib import Path
from typing import Annotated, Any

import typer
from pydantic import TypeAdapter, ValidationError
from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.table import Table
from rich.text import Text

from gptj_serve import environment
from gptj_serve.api.status import PipelineStatus, ScalingStatus, StageStatus, Status
from gptj_serve.errors import ConfigError, GPTJServeError

TIMEOUT_S = 10.0
PERIOD_S = 1.0
BAR_WIDTH = 20
NARROW_BAR_WIDTH = 6
MIN_WIDE_WIDTH = 110
"""A narrower terminal gets shorter bars, and no column with the processes."""

_STATUS = TypeAdapter(Status)


class _NoRedirects(urllib.request.HTTPRedirectHandler):
    """Where they lead the key would go along."""

    def redirect_request(self, *_: Any) -> None:
        return None


_OPENER = urllib.request.build_opener(_NoRedirects)


class StatusError(GPTJServeError):
    """The service's status is not to be had."""


def status(
    url: Annotated[str, typer.Option(help="Of the service.")] = "http://127.0.0.1:8000",
    api_key: Annotated[
        str | None, typer.Option(envvar=environment.API_KEY, show_default=False, help="If the service asks for one.")
    ] = None,
    once: Annotated[bool, typer.Option("--once", help="Print it once instead of renewing it until Ctrl-C.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print it once, as JSON.")] = False,
    trace: Annotated[
        Path | None,
        typer.Option(
            help="Write the stages' last steps to this file, for ui.perfetto.dev; compressed if it ends in .gz."
        ),
    ] = None,
) -> None:
    """Show what a running service, its pipelines and their stages are doing."""
    if trace is not None:
        if once or as_json:
            raise ConfigError(f"--trace={trace}: can't be set beside --{'json' if as_json else 'once'}")
        return _write_trace(trace, url, api_key)
    first = fetch_status(url, api_key)
    if as_json:
        return typer.echo(json.dumps(first, indent=2))
    console = Console()
    if not console.is_terminal:
        return Console(width=MIN_WIDE_WIDTH, soft_wrap=True).print(render(first))
    if once:
        return console.print(render(first, console.width))
    with Live(render(first, console.width), console=console, auto_refresh=False) as live:
        try:
            while True:
                time.sleep(PERIOD_S)
                live.update(render(fetch_status(url, api_key), console.width), refresh=True)
        except KeyboardInterrupt:
            return None


def _write_trace(file: Path, url: str, api_key: str | None) -> None:
    from gptj_serve.profiling.service_timeline import service_timelines
    from gptj_serve.profiling.trace_events import check_trace_file, write_trace

    check_trace_file(file)
    status = fetch_status(url, api_key)
    timelines = service_timelines(status)
    write_trace(file, timelines, {"model": status["model"], "version": status["version"], "url": url})
    for problem in status["problems"]:
        typer.echo(problem, err=True)
    for name, timeline in timelines.items():
        num_steps = len({span.microbatch_id for span in timeline.spans})
        typer.echo(f"{name}: {num_steps} steps of {timeline.num_stages} stages, over {timeline.duration_s:.2f} s")
    typer.echo(f"timeline: {file}, for ui.perfetto.dev or chrome://tracing")


def fetch_status(url: str, api_key: str | None = None) -> Status:
    """Raises `StatusError`, saying what is wrong in one line."""
    if not url.startswith(("http://", "https://")):
        raise StatusError(f"--url={url!r}: must begin with http:// or https://")
    address = f"{url.rstrip('/')}/status"
    headers = {} if api_key is None else {"Authorization": f"Bearer {api_key}"}
    request = urllib.request.Request(address, headers=headers)  # noqa: S310  # its scheme is checked
    try:
        with _OPENER.open(request, timeout=TIMEOUT_S) as response:
            return _STATUS.validate_json(response.read())
    except urllib.error.HTTPError as error:
        error.close()
        raise StatusError(f"{address}: HTTP {error.code} {error.reason}{_hint(error)}") from None
    except ValidationError:
        raise StatusError(f"{address}: what answers there is not this service's status") from None
    except (OSError, HTTPException, ValueError) as error:
        reason = getattr(error, "reason", None) or error
        raise StatusError(f"{address}: {reason}") from None


def _hint(error: urllib.error.HTTPError) -> str:
    if error.code in (401, 403):
        return f"; it asks for an API key (--api-key or {environment.API_KEY})"
    if 300 <= error.code < 400:
        return f"; it leads to {error.headers['Location']}, and is not followed, since that may be anybody's"
    return ""


def render(status: Status, width: int = MIN_WIDE_WIDTH) -> RenderableType:
    """For a terminal of so many columns."""
    lines: list[RenderableType] = [_service_line(status)]
    if status["scaling"] is not None:
        lines.append(_scaling_line(status["scaling"], len(status["pipelines"])))
    for pipeline in status["pipelines"]:
        lines += ["", _pipeline_line(pipeline), _stage_table(pipeline["stages"], is_narrow=width < MIN_WIDE_WIDTH)]
    lines += [Text(problem, style="red") for problem in status["problems"]]
    return Group(*lines)


def _service_line(status: Status) -> Text:
    ingress = status["ingress"]
    heads = [f"{name} ({kind})" for name, kind in status["heads"].items()]
    return _line(
        [
            (status["model"], "bold"),
            (f"gptj_serve {status['version']}, up {_duration(status['uptime_s'])}", ""),
            (", ".join([*status["tasks"], *heads]), ""),
            (f"{ingress['num_requests']} of at most {ingress['max_requests']} requests", ""),
        ]
    )


def _scaling_line(scaling: ScalingStatus, num_pipelines: int) -> Text:
    bounds = f"{scaling['min_pipelines']} to {scaling['max_pipelines']}"
    parts = [("pipelines by load", "bold"), (f"{num_pipelines} of {bounds}", "")]
    changes = scaling["changes"] or {"num_starting": 0, "num_stopping": 0}
    if changes["num_starting"]:
        parts.append((f"{changes['num_starting']} starting", "yellow"))
    elif num_pipelines == scaling["min_pipelines"] == 0:
        parts.append(("the next request starts one", ""))
    if changes["num_stopping"]:
        parts.append((f"{changes['num_stopping']} finishing what they have begun", "yellow"))
    return _line(parts)


def _pipeline_line(pipeline: PipelineStatus) -> Text:
    engine = pipeline["engine"]
    used, total = engine["num_kv_blocks_used"], engine["num_kv_blocks"]
    queue = f" for about {engine['queue_wait_s']:.0f} s" if engine["queue_wait_s"] >= 1 else ""
    ready = ("ready", "green") if pipeline["is_ready"] else ("stages are started again", "red")
    parts = [
        (f"pipeline {pipeline['replica_id']}", "bold"),
        ready,
        (f"{pipeline['tokens_per_s']:,.0f} tokens/s", "cyan"),
        (f"{engine['num_running']} running, {engine['num_waiting']} waiting{queue}", ""),
        (f"KV {_bar(used / max(1, total))} {used:,}/{total:,} blocks", ""),
        (f"{engine['num_preemptions']:,} preemptions, {engine['num_recoveries']:,} recoveries", ""),
    ]
    handoffs = dict.fromkeys(kind for stage in pipeline["stages"] if (kind := stage.get("handoff")))  # in their order
    if handoffs:
        parts.append((f"handoff by {', '.join(handoffs)}", ""))
    return _line(parts)


def _stage_table(stages: Iterable[StageStatus], *, is_narrow: bool) -> Table:
    table = Table(box=None, padding=(0, 2, 0, 0), header_style="dim")
    for column in ("stage", "layers", "device", "memory", "busy", "handoff", "restarts", "process"):
        if not (is_narrow and column == "process"):
            table.add_column(column, no_wrap=True)
    for stage in stages:
        first, end = stage["layers"]
        handoff_s = stage["handoff_s"]
        cells = [
            str(stage["stage_index"]),
            f"{first}-{end - 1}",
            f"{stage['device']} {stage['dtype']}",
            f"{stage['memory_bytes'] / 1e9:.2f} GB",
            f"{_bar(stage['busy_ratio'], NARROW_BAR_WIDTH if is_narrow else BAR_WIDTH)} {stage['busy_ratio']:4.0%}",
            "" if handoff_s is None else f"{handoff_s * 1e3:.2f} ms",
            str(stage["num_restarts"]),
            f"{stage['pid']} on {stage['node_ip']}",
        ]
        table.add_row(*cells[: len(table.columns)])
    return table


def _line(parts: list[tuple[str, str]]) -> Text:
    return Text("  ").join(Text(text, style=style) for text, style in parts)


def _bar(share: float, width: int = BAR_WIDTH) -> str:
    filled = round(min(1.0, max(0.0, share)) * width)
    return "█" * filled + "░" * (width - filled)


def _duration(seconds: float) -> str:
    minutes, rest = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    days, hours = divmod(hours, 24)
    parts: list[tuple[Any, str]] = [(days, "d"), (hours, "h"), (minutes, "min"), (rest, "s")]
    shown = [f"{number} {unit}" for number, unit in parts if number] or ["0 s"]
    return " ".join(shown[:2])
