"""Imports point down only, as docs/architecture.md says. The rules are read from the source: lazy imports count too."""

import ast
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

import gptj_serve

ROOT = Path(gptj_serve.__file__).parent
PACKAGE = "gptj_serve"


@dataclass(frozen=True)
class Rule:
    """No module under `importers` (except those under `exempt`) imports one under `forbidden` (except `allowed`)."""

    reason: str
    importers: tuple[str, ...]
    forbidden: tuple[str, ...]
    exempt: tuple[str, ...] = ()
    allowed: tuple[str, ...] = ()


def ours(*names: str) -> tuple[str, ...]:
    return tuple(f"{PACKAGE}.{name}" for name in names)


LAYERS = [
    ours("types", "steps", "errors", "wire", "environment", "config", "queue_wait", "scaling"),
    ours("tokenizer", "grammar", "extractive_qa", "generation_rules", "zero_shot", "model", "engine"),
    ours("kernels", "routing"),
    ours("pipeline", "planner", "remedies", "gpus"),
    ours("modeling"),
    ours("api", "fit"),
    ours("profiling"),
    ours("simulation"),
    ours("serving"),
    ours("cli", "fit_cli", "profile_cli", "simulate_cli", "bench_cli", "status_cli"),
]

SAMPLER = ours("engine.sampling", "engine.logit_edits", "engine.warpers", "engine.draws", "engine.ranking")

RULES = [
    Rule("only serving and cli know Ray", (PACKAGE,), ("ray",), exempt=ours("serving", "cli")),
    Rule("types, steps, errors, config and wire import only each other", LAYERS[0], (PACKAGE,), allowed=LAYERS[0]),
    *(
        Rule(
            f"imports go downward: {', '.join(layer)} may not know what stands above",
            layer,
            tuple(name for higher in LAYERS[level + 1 :] for name in higher),
        )
        for level, layer in enumerate(LAYERS)
    ),
    Rule(
        "partition and plan are arithmetic",
        ours("pipeline.partition", "pipeline.kv_room", "pipeline.gpu.buckets", "planner", "remedies", "gpus"),
        ("torch", *ours("engine", "model.stage", "model.weights", "pipeline")),
        allowed=ours("pipeline.partition", "pipeline.gpu.buckets"),
    ),
    Rule(
        "a grammar knows texts and tokens only", ours("grammar"), ("torch", *ours("extractive_qa", "model", "engine"))
    ),
    Rule("a grammar's trial starts fast", ours("grammar.library"), (PACKAGE,)),
    Rule("the model does not know the engine", ours("model"), ours("engine")),
    Rule("the engine does not know the model", ours("engine"), ours("model")),
    Rule(
        "the engine holds no tensors but in its sampler",
        ours("engine"),
        ("torch", *SAMPLER),
        exempt=SAMPLER,
    ),
    Rule("the API knows the engine only as a Protocol", ours("api"), ("torch", *ours("engine", "pipeline", "serving"))),
    Rule("the model classes are for people: nothing builds on them", ours("api", "serving", "cli"), ours("modeling")),
    Rule(
        "a tokenizer is to be had without torch",
        ours("modeling.tokenization", "modeling.special_tokens", "modeling.hub"),
        ("torch", *ours("model", "engine", "pipeline")),
    ),
    Rule("only cli builds on serving", (PACKAGE,), ours("serving"), exempt=ours("serving", "cli")),
    Rule(
        "a service's timeline is written without torch",
        ours("profiling.trace_events", "profiling.service_timeline", "profiling.load", "profiling.deployment"),
        ("torch", *SAMPLER, *ours("model", "pipeline", "profiling.session", "profiling.operators")),
    ),
    Rule(
        "a simulation needs no torch; what calibrates it does",
        ours("simulation"),
        ("torch", *SAMPLER, *ours("model.stage", "pipeline", "profiling.session")),
        exempt=ours("simulation.calibration"),
        allowed=ours("pipeline.partition"),
    ),
    Rule("a checkpoint can be refused without torch", ours("model.config", "model.checkpoint"), ("torch",)),
]


def is_under(module: str, roots: tuple[str, ...]) -> bool:
    return any(module == root or module.startswith(f"{root}.") for root in roots)


def imports_of(path: Path, root: Path) -> Iterator[tuple[int, str]]:
    """(line, module) of every import, `from package import submodule` and relative ones spelt out in full."""
    package = (PACKAGE, *path.relative_to(root).parent.parts)
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            up = package[: len(package) - node.level + 1] if node.level else ()
            base = ".".join([*up, *([node.module] if node.module else [])])
            yield from ((node.lineno, f"{base}.{alias.name}") for alias in node.names)


def violations(rule: Rule, root: Path) -> list[str]:
    found = []
    for path in sorted(root.rglob("*.py")):
        parts = path.relative_to(root).with_suffix("").parts
        importer = ".".join([PACKAGE, *(part for part in parts if part != "__init__")])
        if not is_under(importer, rule.importers) or is_under(importer, rule.exempt):
            continue
        found += [
            f"{path.relative_to(root.parent)}:{line} imports {module}: {rule.reason}"
            for line, module in imports_of(path, root)
            if is_under(module, rule.forbidden) and not is_under(module, rule.allowed) and module != PACKAGE
        ]
    return found


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.reason)
def test_rule_holds(rule: Rule):
    assert not violations(rule, ROOT), "\n".join(violations(rule, ROOT))


@pytest.mark.parametrize(
    ("importer", "source"),
    [
        ("engine/loop.py", "def later():\n    import ray.serve"),
        ("types.py", "from gptj_serve import engine"),
        ("model/stage.py", "from gptj_serve.engine.sampling import sample"),
        ("engine/scheduler.py", "from ..model import config"),
        ("engine/scheduler.py", "from torch import Tensor"),
        ("engine/engine.py", "from gptj_serve.engine.ranking import best"),
        ("api/app.py", "import gptj_serve.pipeline.in_process"),
        ("model/attention.py", "from ..pipeline.in_process import InProcessPipeline"),
        ("pipeline/zmq.py", "from gptj_serve.serving import stage_actor"),
        ("model/config.py", "import torch.nn"),
        ("pipeline/stage_loop.py", "from gptj_serve.modeling.cache import DynamicCache"),
        ("api/app.py", "from gptj_serve.modeling.heads import GPTJForCausalLM"),
        ("modeling/heads.py", "from gptj_serve.serving import app"),
        ("planner.py", "from gptj_serve.pipeline.stage_runner import StageRunner"),
        ("profiling/trace_events.py", "from gptj_serve.profiling.operators import ProfiledRunner"),
        ("profiling/session.py", "from gptj_serve.serving.stage_actor import StageSettings"),
        ("grammar/matcher.py", "from gptj_serve.engine.sequence import Sequence"),
        ("grammar/library.py", "from gptj_serve.types import Grammar"),
    ],
)
def test_a_planted_wrong_import_is_found(tmp_path: Path, importer: str, source: str):
    path = tmp_path / PACKAGE / importer
    path.parent.mkdir(parents=True)
    path.write_text(source)
    messages = [message for rule in RULES for message in violations(rule, tmp_path / PACKAGE)]
    assert messages
    assert all(message.startswith(f"{PACKAGE}/{importer}:") for message in messages)


def test_environment_variables_are_read_in_one_place():
    found = [
        f"{path.relative_to(ROOT.parent)}:{node.lineno}"
        for path in ROOT.rglob("*.py")
        if path != ROOT / "environment.py"
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.Attribute) and node.attr in ("environ", "environb", "getenv", "getenvb")
    ]
    assert found == []


def test_environment_variables_are_named_in_one_place():
    found = [
        f"{path.relative_to(ROOT.parent)}:{node.lineno}"
        for path in ROOT.rglob("*.py")
        if path != ROOT / "environment.py"
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and node.value.startswith("GPTJ_SERVE_")
    ]
    assert found == []


def test_the_http_side_starts_without_torch_and_ray():
    code = "import sys, gptj_serve.api.app, gptj_serve.tokenizer; print({'torch', 'ray'} & set(sys.modules))"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "set()"


def test_the_timeline_of_a_service_is_written_without_torch_and_ray():
    code = (
        "import sys, gptj_serve.status_cli, gptj_serve.profile_cli, gptj_serve.profiling.service_timeline;"
        "import gptj_serve.profiling.trace_events; print({'torch', 'ray'} & set(sys.modules))"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "set()"


def test_the_public_names_are_imported_when_asked_for():
    code = (
        "import sys, gptj_serve; from gptj_serve import AutoTokenizer, GPTJConfig; print({'torch'} & set(sys.modules));"
        "print([n for n in gptj_serve.__all__ if getattr(gptj_serve, n).__name__ != n or n not in dir(gptj_serve)])"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.split() == ["set()", "[]"]
    with pytest.raises(AttributeError, match="GPTJForTokenClassification"):
        gptj_serve.GPTJForTokenClassification  # noqa: B018
