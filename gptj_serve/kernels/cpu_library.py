"""`cpu_library`: cpu.cpp, compiled for this machine when it is first needed, and its functions.

It is compiled with g++ (or what `CXX` names) into the user's cache directory, under a name made of the source, the
flags and the compiler's version: so it is compiled once on a machine, and a restart takes it from there.
"""

import atexit
import contextlib
import ctypes
import fcntl
import functools
import hashlib
import importlib.util
import os
import shutil
import subprocess
import tempfile
import threading
from ctypes import POINTER, Structure, c_float, c_int32, c_int64, c_void_p
from pathlib import Path

from gptj_serve.environment import compiler, user_cache
from gptj_serve.errors import GPTJServeError

SOURCE = Path(__file__).with_name("cpu.cpp")
REQUIRED = ("avx512f", "avx512bw", "avx512dq", "avx512vl", "fma")
"""Of the CPU, as /proc/cpuinfo calls it."""

OPTIONAL = {"avx512_vnni": "-mavx512vnni", "avx512_bf16": "-mavx512bf16"}
FLAGS = (
    "-O3",
    "-ffp-contract=off",
    "-std=c++17",
    "-shared",
    "-fPIC",
    "-fopenmp",
    *(f"-m{feature}" for feature in REQUIRED),
)
COMPILE_TIMEOUT_S = 300.0


class KernelsUnavailableError(GPTJServeError):
    """This machine can't run them, or not compile them; the message says why."""


class Weight(Structure):
    """`GPTJWeight` of cpu.cpp."""

    _fields_ = (
        ("type", c_int32),
        ("num_outputs", c_int32),
        ("width", c_int32),
        ("panels", c_void_p),
        ("scale", c_void_p),
        ("sum", c_void_p),
        ("bias", c_void_p),
    )


class Layer(Structure):
    """`GPTJLayer` of cpu.cpp."""

    _fields_ = (
        ("norm_weight", c_void_p),
        ("norm_bias", c_void_p),
        ("inward", Weight),
        ("attention_out", Weight),
        ("mlp_out", Weight),
        ("keys", c_void_p),
        ("values", c_void_p),
    )


class Shape(Structure):
    """`GPTJShape` of cpu.cpp."""

    _fields_ = (
        ("width", c_int32),
        ("num_heads", c_int32),
        ("rotated_dim", c_int32),
        ("inner_width", c_int32),
        ("activation", c_int32),
        ("kv_type", c_int32),
        ("num_layers", c_int32),
        ("eps", c_float),
        ("scale", c_float),
        ("sin", c_void_p),
        ("cos", c_void_p),
        ("layers", POINTER(Layer)),
    )


@functools.cache
def cpu_features() -> frozenset[str]:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return frozenset()
    return frozenset(next((line.split(":", 1)[1].split() for line in lines if line.startswith("flags")), []))


@functools.cache
def cpu_library() -> ctypes.CDLL:
    """Compiled if need be. Raises `KernelsUnavailableError`."""
    try:
        library = ctypes.CDLL(str(compiled_library()))
    except OSError as error:
        raise KernelsUnavailableError(f"the compiled kernels can't be loaded: {error}") from error
    library.gptj_stage_new.argtypes = [POINTER(Shape)]
    library.gptj_stage_new.restype = c_void_p
    library.gptj_stage_free.argtypes = [c_void_p]
    library.gptj_stage_free.restype = None
    library.gptj_stage_forward.argtypes = [c_void_p, c_void_p, c_int64, c_void_p, c_int64, c_void_p, c_int32]
    library.gptj_stage_forward.restype = None
    library.gptj_linear.argtypes = [POINTER(Weight), c_void_p, c_int64, c_void_p, c_int32]
    library.gptj_linear.restype = None
    library.gptj_row_statistics.argtypes = [c_void_p, c_int64, c_int64, c_int64, c_void_p, c_void_p, c_int32]
    library.gptj_row_statistics.restype = None
    return library


def start_compiling() -> None:
    """In a thread; whoever calls `cpu_library` meanwhile waits for it, and hears of what went wrong."""

    def compile_if_possible() -> None:
        with contextlib.suppress(GPTJServeError, OSError):
            compiled_library()

    threading.Thread(target=compile_if_possible, name="compile-kernels", daemon=True).start()


def compiled_library() -> Path:
    """The file, compiled if it is not there yet: some seconds. Raises `KernelsUnavailableError`."""
    missing = [feature for feature in REQUIRED if feature not in cpu_features()]
    if missing:
        raise KernelsUnavailableError(f"this CPU has no {', '.join(missing)}")
    command = compiler()
    if shutil.which(command[0]) is None:
        raise KernelsUnavailableError(f"there is no {command[0]} to compile them with")
    flags = [*FLAGS, *(flag for feature, flag in OPTIONAL.items() if feature in cpu_features()), *_openmp_of_torch()]
    version = _output_of([*command, "--version"])
    key = hashlib.sha256("\0".join([SOURCE.read_text(encoding="utf-8"), *flags, version]).encode()).hexdigest()[:32]
    directory = _cache_directory()
    target = directory / f"cpu-{key}.so"
    try:
        with (directory / "lock").open("w") as lock:  # of several stages that start at once, one compiles
            fcntl.flock(lock, fcntl.LOCK_EX)
            if not target.exists():
                unfinished = target.with_suffix(".unfinished")
                _output_of([*command, *flags, str(SOURCE), "-o", str(unfinished)])
                unfinished.replace(target)
    except OSError as error:
        raise KernelsUnavailableError(f"they can't be compiled into {directory}: {error}") from error
    return target


def _output_of(command: list[str]) -> str:
    try:
        done = subprocess.run(  # noqa: S603 (the compiler, on a file of this package)
            command, capture_output=True, text=True, errors="replace", check=False, timeout=COMPILE_TIMEOUT_S
        )
    except subprocess.TimeoutExpired:
        raise KernelsUnavailableError(f"{command[0]} took more than {COMPILE_TIMEOUT_S:g} s") from None
    if done.returncode != 0:
        first_error = next((line for line in done.stderr.splitlines() if "error" in line), done.stderr[-200:])
        raise KernelsUnavailableError(f"{command[0]} failed: {first_error}")
    return done.stdout


def _cache_directory() -> Path:
    """The user's own, since what is in it is run. A new one for this process where there is no such."""
    try:
        directory = user_cache() / "gptj_serve"
        directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        status = directory.stat()
        if status.st_uid == os.getuid() and not status.st_mode & 0o022 and os.access(directory, os.W_OK):
            return directory
    except (OSError, RuntimeError):  # the latter: there is no home
        pass
    return _directory_of_this_process()


@functools.cache
def _directory_of_this_process() -> Path:
    directory = tempfile.mkdtemp(prefix="gptj-serve-kernels-")
    atexit.register(shutil.rmtree, directory, ignore_errors=True)
    return Path(directory)


def _openmp_of_torch() -> list[str]:
    """Link with the OpenMP that torch brings, if it does: two in a process would have two pools of threads."""
    torch = importlib.util.find_spec("torch")  # not imported: it takes seconds, in which the compiler can be at work
    assert torch is not None
    found = [file for place in torch.submodule_search_locations or [] for file in Path(place).glob("lib/libgomp*.so*")]
    return [str(found[0]), f"-Wl,-rpath,{found[0].parent}"] if found else []
