"""How the kernels come about: compiled once, into a directory that is the user's own; and what happens where they
can't be. Compilers that are asked here mostly hand out the library that there is."""

import logging
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from gptj_serve.errors import ConfigError
from gptj_serve.kernels import choice
from gptj_serve.kernels import cpu_library as library_module
from gptj_serve.kernels.choice import Quantization, choose_operand_type
from gptj_serve.kernels.cpu_library import KernelsUnavailableError, cpu_library, start_compiling
from gptj_serve.kernels.weights import OperandType, PackedLinear
from gptj_serve.model.checkpoint import Checkpoint
from gptj_serve.model.config import GPTJConfig
from gptj_serve.pipeline.stage_runner import StageRunner, StageSpec
from gptj_serve.steps import MicroBatch, Row
from tests.kernels.packed import Inputs, alone, config_of, packed, random_stage

CPU = torch.device("cpu")


@dataclass(frozen=True)
class Compiler:
    """Hands out `library`, after a while, and counts how often it was asked."""

    path: Path
    log: Path

    @classmethod
    def make(cls, directory: Path, library: str, *, version: str = "1", then: str = "") -> "Compiler":
        path, log = directory / f"compiler-{version}", directory / f"log-{version}"
        log.touch()
        path.write_text(
            f"""#!/bin/sh
            if [ "$1" = --version ]; then echo "fake {version}"; exit; fi
            echo asked >> {log}
            for last; do :; done
            {then or f'sleep 0.5; cp {library} "$last"'}
            """
        )
        path.chmod(0o755)
        return cls(path, log)

    @property
    def num_compiled(self) -> int:
        return len(self.log.read_text().splitlines())


@pytest.fixture
def compiled() -> str:
    return cpu_library()._name


@pytest.fixture
def cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, compiled: str) -> Iterator[Path]:
    """An empty cache for a process that has no library yet."""
    directory = tmp_path / "cache"
    monkeypatch.setenv("XDG_CACHE_HOME", str(directory))
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "tmp"))
    (tmp_path / "tmp").mkdir()
    kept = (cpu_library, library_module._directory_of_this_process, choice._log_once)
    for function in kept:
        function.cache_clear()
    yield directory / "gptj_serve"
    for function in kept:
        function.cache_clear()


@pytest.fixture
def compiler(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, compiled: str, cache: Path) -> Compiler:
    made = Compiler.make(tmp_path, compiled)
    monkeypatch.setenv("CXX", str(made.path))
    return made


def works() -> bool:
    linear = nn.Linear(40, 30).requires_grad_(False)
    x = torch.randn(3, 40)
    return torch.allclose(PackedLinear(linear, OperandType.FLOAT32)(x), linear(x), atol=1e-5)


# ------------------------------------------------------------------------------------------------ compiled once


def test_a_restart_takes_what_is_there(compiler: Compiler, cache: Path) -> None:
    first = cpu_library()
    assert Path(first._name).parent == cache
    assert works()
    made_at = Path(first._name).stat().st_mtime_ns
    cpu_library.cache_clear()
    assert cpu_library() is not first
    assert cpu_library()._name == first._name
    assert Path(first._name).stat().st_mtime_ns == made_at
    assert compiler.num_compiled == 1
    assert cache.stat().st_mode & 0o077 == 0


def test_another_compiler_s_is_another_library(
    compiler: Compiler, cache: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, compiled: str
) -> None:
    first = cpu_library()._name
    newer = Compiler.make(tmp_path, compiled, version="2")
    monkeypatch.setenv("CXX", str(newer.path))
    cpu_library.cache_clear()
    assert cpu_library()._name != first
    assert (compiler.num_compiled, newer.num_compiled) == (1, 1)


def test_a_compiler_may_have_arguments(compiler: Compiler, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", f"env {compiler.path}")
    assert works()
    assert compiler.num_compiled == 1


def test_what_is_compiled_ahead_is_there_when_it_is_needed(compiler: Compiler, cache: Path) -> None:
    start_compiling()
    assert works()
    assert compiler.num_compiled == 1


def test_two_processes_that_start_at_once_compile_once(compiler: Compiler, cache: Path) -> None:
    script = "from tests.kernels.test_cpu_library import works; assert works()"
    processes = [subprocess.Popen([sys.executable, "-c", script], stderr=subprocess.PIPE) for _ in range(2)]
    for process in processes:
        _, errors = process.communicate(timeout=110)
        assert process.returncode == 0, errors.decode()
    assert compiler.num_compiled == 1
    assert len(list(cache.glob("cpu-*.so"))) == 1


@pytest.mark.parametrize("what", ["a file", "open to all", "open to the group", "another user's", "read-only"])
def test_a_directory_that_others_could_write_to_is_not_used(
    compiler: Compiler, cache: Path, tmp_path: Path, what: str
) -> None:
    """It would be run: so the library goes to a new directory."""
    if what in ("another user's", "read-only") and (os.getuid() == 0) != (what == "another user's"):
        pytest.skip("needs root" if what == "another user's" else "root may write everywhere")
    cache.parent.mkdir()
    if what == "a file":
        cache.touch()
    else:
        cache.mkdir()
        cache.chmod({"open to all": 0o777, "open to the group": 0o770, "read-only": 0o500}.get(what, 0o700))
    if what == "another user's":
        os.chown(cache, 12345, 12345)
    assert works()
    directory = Path(cpu_library()._name).parent
    assert directory.parent == tmp_path / "tmp"
    assert directory.stat().st_mode & 0o777 == 0o700
    assert not cache.is_dir() or list(cache.iterdir()) == []
    cpu_library.cache_clear()
    assert works()
    assert compiler.num_compiled == 1


# ------------------------------------------------------------------------------------------------ where they can't be


def broken_compilers(directory: Path) -> dict[str, tuple[str, str]]:
    """`CXX` and what is said."""
    fails = Compiler.make(directory, "", version="fails", then="echo 'x.cpp:1:2: error: no such thing' >&2; exit 1")
    makes_junk = Compiler.make(directory, "", version="junk", then='echo junk > "$last"')
    return {
        "absent": ("/nonexistent", "there is no /nonexistent to compile them with"),
        "failing": (str(fails.path), f"{fails.path} failed: x.cpp:1:2: error: no such thing"),
        "broken": (str(makes_junk.path), "the compiled kernels can't be loaded"),
    }


@pytest.fixture(params=["absent", "failing", "broken"])
def said(request: pytest.FixtureRequest, cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """With a compiler that is of no use: why not."""
    command, said = broken_compilers(tmp_path)[request.param]
    monkeypatch.setenv("CXX", command)
    return said


def test_a_compiler_that_is_of_no_use_is_named(said: str) -> None:
    start_compiling()  # says nothing: whoever needs the library hears of it
    with pytest.raises(KernelsUnavailableError) as raised:
        cpu_library()
    assert said in str(raised.value)


def test_what_failed_once_can_work_later(
    cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, compiled: str
) -> None:
    monkeypatch.setenv("CXX", broken_compilers(tmp_path)["failing"][0])
    with pytest.raises(KernelsUnavailableError):
        cpu_library()
    assert not list(cache.glob("*.so"))
    monkeypatch.setenv("CXX", str(Compiler.make(tmp_path, compiled, version="fails").path))
    assert works()


def spec(span: range, **changes: object) -> StageSpec:
    return StageSpec(**{  # type: ignore[arg-type]
        "span": span, "num_kv_blocks": 8, "block_size": 16, "dtype": torch.float32, "device": CPU, "num_token_ids": 97,
        **changes,
    })  # fmt: skip


def hidden_states(directory: Path, **changes: object) -> Tensor:
    """What the first of two stages makes of a prompt."""
    checkpoint = Checkpoint.open(directory)
    first, _ = (StageRunner.load(checkpoint, spec(span, **changes)) for span in (range(3), range(3, 6)))
    result = first.run(MicroBatch(0, [Row([5, 17, 40, 3, 88, 61, 9], 0, [3])], []), None)
    assert isinstance(result, Tensor)
    return result


def test_stages_run_on_pytorch_s_kernels_then_and_say_so_once(
    tiny_gptj, said: str, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.INFO, logger="gptj_serve"):
        without = hidden_states(tiny_gptj())
    messages = [record.getMessage() for record in caplog.records]
    assert len(messages) == 1, messages
    assert messages[0].startswith("the layers run on PyTorch's kernels, not on our own: ")
    assert said in messages[0]
    assert torch.equal(without, hidden_states(tiny_gptj(), kernels="torch"))


def test_our_own_or_pytorch_s_as_asked_is_nothing_to_log(tiny_gptj, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, logger="gptj_serve"):
        ours, theirs = hidden_states(tiny_gptj()), hidden_states(tiny_gptj(), kernels="torch")
    assert not caplog.records
    assert not torch.equal(ours, theirs)  # other orders of sums
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-4)


def test_int8_without_kernels_is_refused(tiny_gptj, said: str) -> None:
    with pytest.raises(ConfigError) as raised:
        StageRunner.load(Checkpoint.open(tiny_gptj()), spec(range(3), quantization="int8"))
    assert str(raised.value).startswith("quantization=int8: there are no kernels for it here: ")
    assert said in str(raised.value)


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"dtype": torch.float16}, "they have no float16"),
        ({"block_size": 8}, "their KV blocks have 16 tokens, not 8"),
        ({"activation": "gelu"}, "they have no activation_function gelu"),
        ({"activation": "tanh"}, "they have no activation_function tanh"),
        ({"device": torch.device("cuda")}, "not on cuda"),
        ({"kernels": "torch"}, "it is asked for by kernels: torch"),
    ],
)
def test_what_they_can_t_do(changes: dict[str, object], reason: str, caplog: pytest.LogCaptureFixture) -> None:
    values = {"activation": "gelu_new", "dtype": torch.float32, "device": CPU, "block_size": 16, "kernels": "auto"}
    values |= changes
    config = GPTJConfig(activation_function=values.pop("activation"))

    def choose(quantization: Quantization) -> OperandType | None:
        return choose_operand_type(config, quantization=quantization, **values)  # type: ignore[arg-type]

    choice._log_once.cache_clear()
    with caplog.at_level(logging.INFO, logger="gptj_serve"):
        assert choose("none") is None
        assert choose("none") is None
    is_obvious = "kernels" in changes or "device" in changes
    expected = [] if is_obvious else [f"the layers run on PyTorch's kernels, not on our own: {reason}"]
    assert [record.getMessage() for record in caplog.records] == expected
    with pytest.raises(ConfigError, match=f"quantization=int8.*{reason}"):
        choose("int8")


@pytest.mark.usefixtures("int8_kernels")
def test_what_they_can_do() -> None:
    chosen = [
        choose_operand_type(GPTJConfig(), dtype, CPU, 16, quantization, "auto")
        for dtype in (torch.float32, torch.bfloat16)
        for quantization in ("none", "int8")
    ]
    assert chosen == [OperandType.FLOAT32, OperandType.INT8, OperandType.BFLOAT16, OperandType.INT8]


@pytest.mark.parametrize(
    ("missing", "quantization", "reason"),
    [
        ("avx512f", "none", "this CPU has no avx512f"),
        ("avx512bw", "none", "this CPU has no avx512bw"),
        ("avx512_vnni", "int8", "this CPU has no avx512_vnni"),
    ],
)
def test_a_cpu_without_the_instructions(
    cache: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    missing: str,
    quantization: Quantization,
    reason: str,
) -> None:
    features = library_module.cpu_features() - {missing}
    for importer in (library_module, choice):
        monkeypatch.setattr(importer, "cpu_features", lambda: features)
    arguments = (GPTJConfig(), torch.float32, CPU, 16)
    with caplog.at_level(logging.INFO, logger="gptj_serve"):
        if quantization == "int8":
            with pytest.raises(ConfigError, match=reason):
                choose_operand_type(*arguments, "int8", "auto")
        else:
            assert choose_operand_type(*arguments, "none", "auto") is None
    assert [record.getMessage() for record in caplog.records] == [
        f"the layers run on PyTorch's kernels, not on our own: {reason}"
    ]


# ------------------------------------------------------------------------------------------------ other instructions


def test_without_the_instructions_for_bfloat16(
    cache: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, compiled: str
) -> None:
    """Compiled for a CPU that has none, products of bfloat16 differ in the order of their sums."""
    if (gcc := shutil.which("g++")) is None:
        pytest.skip("there is no g++")
    config = config_of(n_embd=72, n_head=3, rotary_dim=6, n_inner=100)
    stage = random_stage(config)
    sequences = [Inputs(torch.randn(40, 72, generator=torch.Generator().manual_seed(0)))]
    every = (OperandType.FLOAT32, OperandType.BFLOAT16)
    monkeypatch.setenv("XDG_CACHE_HOME", str(Path(compiled).parent.parent))
    (with_fp32,), (with_bf16,) = (alone([packed(stage, operand_type)], sequences) for operand_type in every)
    assert cpu_library()._name == compiled

    wrapper = tmp_path / "older"
    wrapper.write_text(
        f"""#!/usr/bin/env bash
        exec {gcc} "${{@/-mavx512bf16/-O1}}"
        """
    )
    wrapper.chmod(0o755)
    monkeypatch.setenv("CXX", str(wrapper))
    monkeypatch.setenv("XDG_CACHE_HOME", str(cache.parent))
    cpu_library.cache_clear()
    assert cpu_library()._name != compiled
    (fp32,), (bf16,) = (alone([packed(stage, operand_type)], sequences) for operand_type in every)
    assert torch.equal(fp32, with_fp32)
    largest = with_bf16.abs().max().item()
    torch.testing.assert_close(bf16, with_bf16, rtol=0, atol=0.01 * largest)
    error = (bf16 - with_bf16).abs() / largest
    assert error.median() < 1e-4
