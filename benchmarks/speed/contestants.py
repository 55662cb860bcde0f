"""Who is measured, and each one's process: it loads once and takes calls over a pipe.

A process of its own keeps the thread pools of one from the others. OpenMP threads spin for up to 200 ms after their
last work, so each call waits for that long first.
"""

import contextlib
import importlib
import importlib.util
import multiprocessing
import signal
import time
import traceback
from collections.abc import Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, Literal

from benchmarks.speed.models import Precision, kv_bytes_per_token, weight_bytes
from benchmarks.speed.streams import Request, Stream
from benchmarks.stage_environment import stage_environment
from gptj_serve.config import Kernels, Quantization
from gptj_serve.model.config import GPTJConfig

SPIN_S = 0.25
LOADING_TIMEOUT_S = 1800.0
PROCESS_BYTES = 400 << 20
"""Of a process without weights and KV."""


@dataclass(frozen=True, slots=True)
class Contestant:
    engine: Literal["ours", "transformers", "ctranslate2"]
    precision: Precision
    dtype: str = "float32"  # of activations and KV
    quantization: Quantization = "none"
    kernels: Kernels = "auto"

    @property
    def is_peer(self) -> bool:
        return self.engine != "ours"


FP32, BF16, INT8 = Precision("fp32", 4, 4), Precision("bf16", 2, 2), Precision("int8", 1, 4)
CONTESTANTS = {
    "ours-fp32": Contestant("ours", FP32),
    "ours-bf16": Contestant("ours", BF16, "bfloat16"),
    "ours-int8": Contestant("ours", Precision("int8", 1, 2), "bfloat16", quantization="int8"),
    "ours-int8-fp32": Contestant("ours", INT8, quantization="int8"),
    "ours-fp32-torch": Contestant("ours", FP32, kernels="torch"),
    "ours-bf16-torch": Contestant("ours", BF16, "bfloat16", kernels="torch"),
    "transformers-fp32": Contestant("transformers", FP32),
    "transformers-bf16": Contestant("transformers", BF16, "bfloat16"),
    "ctranslate2-fp32": Contestant("ctranslate2", FP32),
    "ctranslate2-int8": Contestant("ctranslate2", INT8, quantization="int8"),
}
NOT_BY_DEFAULT = ("ours-int8-fp32", "ours-fp32-torch", "ours-bf16-torch")
DEFAULT_CONTESTANTS = [name for name in CONTESTANTS if name not in NOT_BY_DEFAULT]


@dataclass(frozen=True, slots=True)
class Settings:
    """What all contestants have in common."""

    directory: Path  # of the checkpoint
    config: GPTJConfig
    threads: int
    num_kv_tokens: int  # of our KV pool
    max_microbatch_tokens: int
    num_stages: int = 1  # of ours


def missing(contestant: Contestant) -> str | None:
    """Why it can't be measured here, if so."""
    # CTranslate2's converter reads with transformers
    needed = ("transformers", contestant.engine) if contestant.is_peer else ()
    return next((f"{module} is not installed" for module in needed if not importlib.util.find_spec(module)), None)


def held_bytes(contestant: Contestant, settings: Settings) -> int:
    """What its process keeps, about: weights, and of ours the KV pool."""
    kept = PROCESS_BYTES + weight_bytes(settings.config, contestant.precision)
    return kept if contestant.is_peer else kept + _kv_bytes(contestant, settings)


def passing_bytes(contestant: Contestant, settings: Settings) -> int:
    """What it takes beside that for a while: a peer for KV, or to load.

    transformers has the weights twice then, CTranslate2's converter all of them in fp32.
    """
    match contestant.engine:
        case "transformers":
            loading = weight_bytes(settings.config, contestant.precision)
        case "ctranslate2":
            loading = weight_bytes(settings.config, FP32)
        case "ours":
            return 0
    return max(loading, _kv_bytes(contestant, settings))


def _kv_bytes(contestant: Contestant, settings: Settings) -> int:
    return settings.num_kv_tokens * kv_bytes_per_token(settings.config, contestant.precision)


class ContestantError(Exception):
    """A contestant could not be loaded, failed or died; the message says how."""


class ContestantProcess:
    """It begins to import at once, and to load when told to. Ours has the environment of the service's stages."""

    def __init__(self, name: str, settings: Settings) -> None:
        self.name = name
        self.contestant = CONTESTANTS[name]
        self.facts: dict[str, Any] = {}
        context = multiprocessing.get_context("spawn")
        self._pipe, theirs = context.Pipe()
        self._process = context.Process(target=_serve, args=(theirs, self.contestant, settings), name=name, daemon=True)
        with contextlib.nullcontext() if self.contestant.is_peer else stage_environment():
            self._process.start()
        theirs.close()

    def load(self) -> None:
        self.facts = self._ask(None, LOADING_TIMEOUT_S)

    def generate(self, requests: Sequence[Request], max_batch: int, limit_s: float) -> list[Stream]:
        """Serve the requests as they come, at most so many at a time; after `limit_s` nothing more is begun."""
        time.sleep(SPIN_S)
        return self._ask(("generate", (requests, max_batch, limit_s)))

    def stages(self) -> list[dict[str, Any]]:
        """Of ours: what each stage's meter shows."""
        return self._ask(("stages", ()))

    def close(self) -> None:
        self._process.kill()
        self._process.join()
        self._pipe.close()

    def _ask(self, call: tuple[str, tuple[Any, ...]] | None, timeout_s: float | None = None) -> Any:
        with contextlib.suppress(ConnectionError):  # it is gone, but may have said why before
            self._pipe.send(call)
        try:
            if not self._pipe.poll(timeout_s):
                raise ContestantError(f"{self.name}: no answer after {timeout_s:.0f} s")
            is_result, content = self._pipe.recv()
        except (EOFError, ConnectionError):
            self._process.join()
            raise ContestantError(f"{self.name}: {_how_it_ended(self._process.exitcode)}") from None
        if not is_result:
            raise ContestantError(f"{self.name}: {content}")
        return content


def _serve(pipe: Connection, contestant: Contestant, settings: Settings) -> None:
    """In the contestant's process."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the parent, which ends this one
    try:
        module = importlib.import_module(f"benchmarks.speed.{contestant.engine}_contestant")
        pipe.recv()
        loaded = module.load(contestant, settings)
        pipe.send((True, loaded.facts))
        while True:
            method, args = pipe.recv()
            pipe.send((True, getattr(loaded, method)(*args)))
    except EOFError:
        pass
    except Exception as error:
        traceback.print_exc()
        pipe.send((False, repr(error)))


def _how_it_ended(exit_code: int | None) -> str:
    if exit_code is not None and exit_code < 0:
        return f"died of {signal.Signals(-exit_code).name}"
    return f"ended with status {exit_code}"
