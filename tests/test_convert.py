"""Converting checkpoints: bit for bit, in little memory, resumable, and whole or not at all."""

import json
import math
import os
import pickle
import resource
import shutil
import subprocess
import sys
import textwrap
from collections.abc import Callable, Iterator
from hashlib import sha256
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import GPTJForCausalLM

from gptj_serve.errors import CheckpointError, ConfigError, ConversionError
from gptj_serve.model import convert, weights
from gptj_serve.model.checkpoint import INDEX_FILE, SINGLE_FILE, Checkpoint, TensorInfo
from gptj_serve.model.checksums import MANIFEST_FILE
from gptj_serve.model.config import GPTJConfig
from gptj_serve.model.convert import JOURNAL_FILE, PICKLE_FILE, PICKLE_INDEX_FILE, Conversion
from gptj_serve.model.stage import load_stage
from gptj_serve.model.weights import DTYPES, pieces
from gptj_serve.planner import Model

Tensors = dict[str, Tensor]


@pytest.fixture
def tensors(tiny_gptj) -> Tensors:
    return load_file(tiny_gptj() / SINGLE_FILE)


@pytest.fixture
def pickled(tiny_gptj, tmp_path: Path) -> Callable[[Any], Path]:
    """A directory with a config.json and this object as pytorch_model.bin."""

    def write(content: Any, **save_options: Any) -> Path:
        directory = tmp_path / "source"
        directory.mkdir(exist_ok=True)
        shutil.copy(tiny_gptj() / "config.json", directory)
        torch.save(content, directory / PICKLE_FILE, **save_options)
        return directory

    return write


@pytest.fixture
def destination(tmp_path: Path) -> Path:
    return tmp_path / "converted"


@pytest.fixture
def small_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(weights, "PIECE_BYTES", 500)


def all_tensors(directory: Path) -> Tensors:
    return {name: t for file in directory.glob("*.safetensors") for name, t in load_file(file).items()}


def assert_bits(actual: Tensors, expected: Tensors) -> None:
    assert actual.keys() == expected.keys()
    for name, tensor in expected.items():
        assert actual[name].dtype == tensor.dtype, name
        assert actual[name].shape == tensor.shape, name
        assert torch.equal(actual[name].view(torch.uint8), tensor.contiguous().view(torch.uint8)), name


def shard_pickle(directory: Path, num_files: int) -> None:
    tensors = torch.load(directory / PICKLE_FILE, weights_only=True)
    weight_map = {name: f"pytorch_model-{n % num_files}.bin" for n, name in enumerate(tensors)}
    for file in set(weight_map.values()):
        torch.save({name: tensor for name, tensor in tensors.items() if weight_map[name] == file}, directory / file)
    (directory / PICKLE_INDEX_FILE).write_text(json.dumps({"weight_map": weight_map}))
    (directory / PICKLE_FILE).unlink()


# ------------------------------------------------------------------------------------------------- what comes out


@pytest.mark.parametrize("num_files", [1, 3])
@pytest.mark.parametrize("stored", [torch.float32, torch.float16])
def test_pickle_bit_for_bit(
    tensors: Tensors, pickled, destination: Path, small_pieces: None, stored: torch.dtype, num_files: int
):
    tensors = {name: tensor.to(stored) for name, tensor in tensors.items()}
    source = pickled(tensors)
    if num_files > 1:
        shard_pickle(source, num_files)
    conversion = Conversion.prepare(source, destination, max_shard_bytes=20_000)
    done: list[int] = []
    conversion.run(done.append)
    assert sum(done) == conversion.num_bytes == sum(f.stat().st_size for f in destination.glob("*.safetensors"))
    assert len(conversion.shards) > 3
    assert_bits(all_tensors(destination), tensors)
    assert sorted(p.name for p in destination.iterdir()) == sorted(
        ["config.json", MANIFEST_FILE, INDEX_FILE, *(shard.file_name for shard in conversion.shards)]
    )
    checksums = json.loads((destination / MANIFEST_FILE).read_text())["sha256"]
    assert checksums == {name: sha256(tensor.numpy().tobytes()).hexdigest() for name, tensor in tensors.items()}
    assert json.loads((destination / "config.json").read_text())["dtype"] == str(stored).removeprefix("torch.")
    assert not conversion.unfinished.exists()


@pytest.mark.parametrize("max_shard_bytes", [20_000, 10**9])
def test_safetensors_to_another_dtype(tiny_gptj, tensors: Tensors, destination: Path, max_shard_bytes: int):
    Conversion.prepare(tiny_gptj(), destination, "bfloat16", max_shard_bytes).run()
    assert_bits(all_tensors(destination), {name: tensor.bfloat16() for name, tensor in tensors.items()})
    assert Checkpoint.open(destination).stored_dtype == "BF16"
    assert (destination / SINGLE_FILE).exists() == (max_shard_bytes == 10**9)


@pytest.mark.parametrize("name", ["wte.weight", "h.1.mlp.fc_in.bias"])
def test_a_damaged_byte_is_found_by_whoever_loads_the_tensor(
    tiny_gptj, destination: Path, small_pieces: None, name: str
):
    Conversion.prepare(tiny_gptj(), destination, max_shard_bytes=10**9).run()
    checkpoint = Checkpoint.open(destination)
    num_layers = checkpoint.config.n_layer
    load_stage(checkpoint, range(num_layers), torch.float32, torch.device("cpu"))
    content = bytearray((destination / SINGLE_FILE).read_bytes())
    header_bytes = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + header_bytes])
    stored = checkpoint.tensors[name].stored_name
    content[8 + header_bytes + header[stored]["data_offsets"][1] - 1] ^= 1
    (destination / SINGLE_FILE).write_bytes(content)
    checkpoint = Checkpoint.open(destination)
    with pytest.raises(CheckpointError, match=f"{SINGLE_FILE}: tensor {stored!r} is damaged"):
        load_stage(checkpoint, range(num_layers), torch.float32, torch.device("cpu"))
    load_stage(checkpoint, range(2, num_layers), torch.float32, torch.device("cpu"))  # has no part of it


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda sha256: sha256.pop("transformer.wte.weight"), "has no checksum of tensor 'transformer.wte.weight'"),
        (lambda sha256: sha256.update(other="00"), "is about other weights: it has tensor 'other'"),
    ],
)
def test_a_manifest_of_other_weights(tiny_gptj, destination: Path, change: Callable[[Any], object], message: str):
    Conversion.prepare(tiny_gptj(), destination).run()
    manifest = json.loads((destination / MANIFEST_FILE).read_text())
    change(manifest["sha256"])
    (destination / MANIFEST_FILE).write_text(json.dumps(manifest))
    with pytest.raises(CheckpointError, match=message):
        Checkpoint.open(destination)
    (destination / MANIFEST_FILE).write_text("{")
    with pytest.raises(CheckpointError, match="can't be read"):
        Checkpoint.open(destination)


def test_transformers_reads_it(tiny_gptj, destination: Path):
    Conversion.prepare(tiny_gptj(), destination, "float16", 20_000).run()
    model = GPTJForCausalLM.from_pretrained(destination)
    assert model.dtype == torch.float16
    original = GPTJForCausalLM.from_pretrained(tiny_gptj()).half().state_dict()
    assert_bits(dict(model.state_dict()), dict(original))


def test_the_old_name_of_the_dtype_stays_in_step(tensors: Tensors, pickled, destination: Path):
    source = pickled(tensors)
    config = json.loads((source / "config.json").read_text()) | {"torch_dtype": "float32"}
    (source / "config.json").write_text(json.dumps(config))
    Conversion.prepare(source, destination, "float16").run()
    written = json.loads((destination / "config.json").read_text())
    assert written == config | {"dtype": "float16", "torch_dtype": "float16"}


def test_tokenizer_files_come_along(tensors: Tensors, pickled, destination: Path):
    source = pickled(tensors)
    (source / "tokenizer.json").write_text('{"a": 1}')
    (source / "merges.txt").write_text("a b")
    (source / "chat_template.jinja").write_text("{{ messages }}")
    (source / "optimizer.pt").write_text("not wanted")
    Conversion.prepare(source, destination).run()
    assert (destination / "tokenizer.json").read_text() == '{"a": 1}'
    assert (destination / "merges.txt").read_text() == "a b"
    assert (destination / "chat_template.jinja").read_text() == "{{ messages }}"
    assert not (destination / "optimizer.pt").exists()


def test_mask_buffers_are_dropped(tensors: Tensors, pickled, destination: Path):
    masks = {"transformer.h.0.attn.bias": torch.ones(1, 1, 4, 4, dtype=torch.bool)}
    masks["transformer.h.0.attn.masked_bias"] = torch.tensor(-1e9)
    Conversion.prepare(pickled(tensors | masks), destination).run()
    assert_bits(all_tensors(destination), tensors)


def test_shared_storages_and_strides(tensors: Tensors, pickled, destination: Path, small_pieces: None):
    """As to_hf_weights.py of mesh-transformer-jax saves them: transposed; and views of a common storage."""
    odd = dict(tensors)
    odd["transformer.h.0.mlp.fc_in.weight"] = tensors["transformer.h.0.mlp.fc_in.weight"].t().contiguous().t()
    odd["lm_head.weight"] = odd["transformer.wte.weight"] = torch.nn.Parameter(tensors["lm_head.weight"])
    both = torch.stack([tensors["transformer.h.1.ln_1.weight"], tensors["transformer.h.1.ln_1.bias"]])
    odd["transformer.h.1.ln_1.weight"], odd["transformer.h.1.ln_1.bias"] = both
    odd["transformer.ln_f.bias"] = torch.tensor(0.5).expand(32)
    Conversion.prepare(pickled(odd), destination, max_shard_bytes=20_000).run()
    assert_bits(all_tensors(destination), {name: tensor.detach().contiguous() for name, tensor in odd.items()})


def test_a_tied_head_is_written_once(tiny_gptj, pickled, destination: Path):
    tied = load_file(tiny_gptj(tie_word_embeddings=True) / SINGLE_FILE)
    source = pickled(tied | {"lm_head.weight": tied["transformer.wte.weight"]})
    shutil.copy(tiny_gptj(tie_word_embeddings=True) / "config.json", source)
    Conversion.prepare(source, destination).run()
    assert_bits(all_tensors(destination), tied)


def test_special_values_keep_their_bits(tensors: Tensors, pickled, destination: Path):
    values = torch.tensor([0x7FC00001, 0x7F800000, -0x80000000, 1], dtype=torch.int32).view(torch.float32)
    tensors["transformer.ln_f.bias"] = values.repeat(8)
    Conversion.prepare(pickled(tensors), destination).run()
    assert_bits(all_tensors(destination), tensors)


@given(
    dtypes=st.lists(st.sampled_from(sorted(DTYPES)), min_size=3, max_size=3),
    max_shard_bytes=st.integers(1, 200_000),
    piece_bytes=st.integers(1, 3000),
)
@settings(max_examples=15)
def test_any_mixture_of_dtypes_and_sizes(
    tiny_gptj, tmp_path_factory: pytest.TempPathFactory, dtypes: list[str], max_shard_bytes: int, piece_bytes: int
):
    work = tmp_path_factory.mktemp("mixture")
    source = tiny_gptj(n_layer=1, vocab_size=13, n_inner=7, pad_token_id=12)
    mixed = {
        name: tensor.to(DTYPES[dtypes[n % 3]])
        for n, (name, tensor) in enumerate(load_file(source / SINGLE_FILE).items())
    }
    (work / "source").mkdir()
    shutil.copy(source / "config.json", work / "source")
    torch.save(mixed, work / "source" / PICKLE_FILE)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(weights, "PIECE_BYTES", piece_bytes)
        Conversion.prepare(work / "source", work / "out", max_shard_bytes=max_shard_bytes).run()
    assert_bits(all_tensors(work / "out"), mixed)


@given(num_rows=st.integers(1, 50), width=st.integers(1, 20), piece_bytes=st.integers(1, 5000))
@settings(max_examples=30)
def test_pieces_cover_a_tensor_once(
    tmp_path_factory: pytest.TempPathFactory, num_rows: int, width: int, piece_bytes: int
):
    tensor = torch.randn(num_rows, width)
    directory = tmp_path_factory.mktemp("pieces")
    save_file({"x": tensor}, directory / "x.safetensors")
    torch.save({"x": tensor}, directory / "x.bin")
    for file in (directory / "x.safetensors", directory / "x.bin"):
        filled = torch.zeros_like(tensor)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(weights, "PIECE_BYTES", piece_bytes)
            for rows, piece in pieces(TensorInfo(file, "x", (num_rows, width), "F32")):
                assert piece.nbytes <= max(piece_bytes, width * 4)
                filled[rows] += piece
        assert torch.equal(filled, tensor)


# -------------------------------------------------------------------------------------------------- what is refused


class Payload:
    """Unpickled carelessly, it makes a file."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.marker),)


@pytest.mark.parametrize("form", ["zip", "plain", "old"])
def test_a_malicious_pickle_is_not_run(tensors: Tensors, pickled, tmp_path: Path, destination: Path, form: str):
    marker = tmp_path / "payload-ran"
    content = tensors | {"transformer.ln_f.bias": Payload(marker)}
    source = pickled(content, _use_new_zipfile_serialization=form != "old")
    if form == "plain":
        (source / PICKLE_FILE).write_bytes(pickle.dumps(Payload(marker)))
    if form == "zip":  # the payload works
        torch.load(source / PICKLE_FILE, weights_only=False)
        marker.rmdir()
    with pytest.raises(CheckpointError) as raised:
        Conversion.prepare(source, destination)
    assert str(source / PICKLE_FILE) in str(raised.value)
    if form == "zip":
        assert "mkdir" in str(raised.value)
    assert not marker.exists()
    assert not destination.exists()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"model": {"a": torch.zeros(1)}}, "holds a dict under 'model'"),
        ({"epoch": 3}, "holds a int under 'epoch'"),
        ({5: torch.zeros(1)}, "under 5"),
        ([torch.zeros(1)], "holds a list"),
        ({"x": torch.zeros(2, 2).to_sparse()}, "'x' is sparse"),
        ({"x": torch.zeros(2, device="meta")}, "'x' is sparse, quantized or without data"),
    ],
    ids=str,
)
def test_anything_but_tensors(pickled, destination: Path, content: Any, message: str):
    with pytest.raises(CheckpointError, match=message):
        Conversion.prepare(pickled(content), destination)


@pytest.mark.parametrize("num_bytes", [0, 10, 5000, -1, -5000])
def test_truncated_pickle(tensors: Tensors, pickled, destination: Path, num_bytes: int):
    source = pickled(tensors)
    (source / PICKLE_FILE).write_bytes((source / PICKLE_FILE).read_bytes()[:num_bytes])
    with pytest.raises(CheckpointError, match=PICKLE_FILE):
        Conversion.prepare(source, destination)


@pytest.mark.parametrize("name", ["transformer.h.3.mlp.fc_in.bias", "lm_head.bias"])
def test_missing_tensor(tensors: Tensors, pickled, destination: Path, name: str):
    del tensors[name]
    with pytest.raises(CheckpointError, match=f"{name.removeprefix('transformer.')!r} is missing"):
        Conversion.prepare(pickled(tensors), destination)


@pytest.mark.parametrize(
    ("tensor", "message"),
    [
        ({"transformer.wpe.weight": torch.zeros(3)}, r"unexpected tensor 'transformer\.wpe\.weight'"),
        ({"transformer.ln_f.bias": torch.zeros(3, 2)}, r"'transformer\.ln_f\.bias' has shape \[3, 2\]"),
        ({"transformer.ln_f.bias": torch.zeros(32, dtype=torch.int8)}, r"'transformer\.ln_f\.bias' has dtype int8"),
    ],
    ids=["extra", "misshapen", "integers"],
)
def test_wrong_tensor(tensors: Tensors, pickled, destination: Path, tensor: Tensors, message: str):
    with pytest.raises(CheckpointError, match=message):
        Conversion.prepare(pickled(tensors | tensor), destination)


def test_another_architecture(tensors: Tensors, pickled, destination: Path):
    source = pickled(tensors)
    (source / "config.json").write_text('{"model_type": "gpt_neox"}')
    with pytest.raises(ConfigError, match="model_type='gpt_neox'"):
        Conversion.prepare(source, destination)


def test_no_weights(tensors: Tensors, pickled, destination: Path):
    source = pickled(tensors)
    (source / PICKLE_FILE).unlink()
    with pytest.raises(CheckpointError, match="has no weights"):
        Conversion.prepare(source, destination)
    with pytest.raises(CheckpointError, match="no such checkpoint directory"):
        Conversion.prepare(source / "nowhere", destination)


def test_a_value_beyond_the_range_of_half_precision(tensors: Tensors, pickled, destination: Path):
    tensors["transformer.h.2.mlp.fc_out.bias"][3] = -70_000.0
    source = pickled(tensors)
    with pytest.raises(ConversionError, match=r"'transformer\.h\.2\.mlp\.fc_out\.bias' holds 70000"):
        Conversion.prepare(source, destination, "float16").run()
    assert not destination.exists()
    Conversion.prepare(source, destination, "bfloat16").run()


def test_destinations_in_the_way(tiny_gptj, tmp_path: Path):
    source = tiny_gptj()
    with pytest.raises(ConversionError, match="is the source itself"):
        Conversion.prepare(source, source / ".." / source.name)
    with pytest.raises(ConversionError, match="exists already"):
        Conversion.prepare(source, tmp_path.parent)
    (tmp_path / "file").touch()
    with pytest.raises(ConversionError, match="exists already"):
        Conversion.prepare(source, tmp_path / "file")
    (tmp_path / "empty").mkdir()
    Conversion.prepare(source, tmp_path / "empty").run()
    foreign = tmp_path / "other.unfinished"
    foreign.mkdir()
    (foreign / "thesis.txt").write_text("keep")
    with pytest.raises(ConversionError, match="no unfinished conversion"):
        Conversion.prepare(source, tmp_path / "other").run()
    assert [p.name for p in foreign.iterdir()] == ["thesis.txt"]


# ------------------------------------------------------------------------------------------- cut off, and taken up


class Killed(BaseException):
    """What nobody catches."""


def run_until(conversion: Conversion, num_bytes: int) -> None:
    """A run that ends, as by a kill, once so much is written."""
    written = 0

    def progress(count: int) -> None:
        nonlocal written
        written += count
        if written > num_bytes:
            raise Killed

    with pytest.raises(Killed):
        conversion.run(progress)


@pytest.fixture
def cut_off(tensors: Tensors, pickled, destination: Path) -> Conversion:
    """Some shards are finished, one is not."""
    conversion = Conversion.prepare(pickled(tensors), destination, max_shard_bytes=20_000)
    run_until(conversion, conversion.num_bytes // 2)
    return conversion


def mtimes(conversion: Conversion) -> dict[str, int]:
    return {file.name: file.stat().st_mtime_ns for file in conversion.unfinished.glob("*.safetensors")}


def test_finished_shards_are_not_written_again(cut_off: Conversion, tensors: Tensors):
    before = mtimes(cut_off)
    assert 2 < len(before) < len(cut_off.shards)
    done: list[int] = []
    cut_off.run(done.append)
    assert sum(done) == cut_off.num_bytes
    assert before.items() <= {f.name: f.stat().st_mtime_ns for f in cut_off.destination.iterdir()}.items()
    assert_bits(all_tensors(cut_off.destination), tensors)


@pytest.mark.parametrize("share", [0.0, 0.01, 0.2, 0.77, 0.999])
def test_what_is_unfinished_is_no_checkpoint(tensors: Tensors, pickled, destination: Path, share: float):
    conversion = Conversion.prepare(pickled(tensors), destination, max_shard_bytes=20_000)
    run_until(conversion, int(conversion.num_bytes * share))
    assert not destination.exists()
    with pytest.raises((CheckpointError, ConfigError)):
        Checkpoint.open(conversion.unfinished)
    conversion.run()
    assert_bits(all_tensors(destination), tensors)


@pytest.mark.parametrize("damage", ["flip", "truncate", "remove"])
def test_a_damaged_shard_is_written_anew(cut_off: Conversion, tensors: Tensors, damage: str):
    shard = sorted(cut_off.unfinished.glob("*.safetensors"))[1]
    content = bytearray(shard.read_bytes())
    content[-7] ^= 1
    match damage:
        case "flip":
            shard.write_bytes(content)
        case "truncate":
            shard.write_bytes(content[:-8])
        case "remove":
            shard.unlink()
    cut_off.run()
    assert_bits(all_tensors(cut_off.destination), tensors)


def test_another_command_does_not_go_on_with_it(cut_off: Conversion, tensors: Tensors, pickled):
    source, destination = cut_off.source.directory, cut_off.destination
    for dtype, max_shard_bytes in [("float16", 20_000), (None, 30_000)]:
        with pytest.raises(ConversionError, match="another source or with other options"):
            Conversion.prepare(source, destination, dtype, max_shard_bytes).run()
    pickled({name: tensor + 1 for name, tensor in tensors.items()})
    with pytest.raises(ConversionError, match="another source"):
        Conversion.prepare(source, destination, None, 20_000).run()


def test_cut_off_before_the_journal_was_whole(tiny_gptj, tensors: Tensors, destination: Path):
    conversion = Conversion.prepare(tiny_gptj(), destination)
    conversion.unfinished.mkdir()
    (conversion.unfinished / f"{JOURNAL_FILE}.partial").write_text('{"source": [')
    conversion.run()
    assert_bits(all_tensors(destination), tensors)


def test_a_damaged_journal(cut_off: Conversion):
    (cut_off.unfinished / JOURNAL_FILE).write_text("{")
    with pytest.raises(ConversionError, match="no unfinished conversion"):
        cut_off.run()


def test_two_at_once(tiny_gptj, destination: Path):
    conversion = Conversion.prepare(tiny_gptj(), destination)
    messages: list[str] = []

    def progress(num_bytes: int) -> None:
        with pytest.raises(ConversionError) as raised:
            Conversion.prepare(tiny_gptj(), destination).run()
        messages.append(str(raised.value))

    conversion.run(progress)
    assert messages
    assert all("another conversion is at work" in message for message in messages)


def in_subprocess(code: str, *arguments: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", textwrap.dedent(code), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def test_killed_and_repeated(tensors: Tensors, pickled, destination: Path):
    """A real kill, in the middle of a shard."""
    source = pickled(tensors)
    code = """
        import os, signal, sys
        from pathlib import Path
        from gptj_serve.model.convert import Conversion
        conversion = Conversion.prepare(Path(sys.argv[1]), Path(sys.argv[2]), max_shard_bytes=20_000)
        calls = iter(range(30))
        conversion.run(lambda n: next(calls, None) is None and os.kill(os.getpid(), signal.SIGKILL))
    """
    assert in_subprocess(code, source, destination).returncode == -9
    assert not destination.exists()
    conversion = Conversion.prepare(source, destination, max_shard_bytes=20_000)
    finished = set(mtimes(conversion))
    assert finished
    assert list(conversion.unfinished.glob("*.partial"))
    conversion.run()
    assert_bits(all_tensors(destination), tensors)


# --------------------------------------------------------------------------------------------------- a full disk


@pytest.fixture
def file_size_limit() -> Iterator[Callable[[int], None]]:
    """The nearest thing to a full disk that needs no mount: no file may grow beyond a size."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    yield lambda size: resource.setrlimit(resource.RLIMIT_FSIZE, (size if size >= 0 else soft, hard))
    resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_a_write_that_fails(tensors: Tensors, pickled, destination: Path, file_size_limit):
    source = pickled(tensors)
    conversion = Conversion.prepare(source, destination, max_shard_bytes=17_000)
    limit = conversion.shards[0].num_bytes
    assert max(shard.num_bytes for shard in conversion.shards) > limit
    file_size_limit(limit)
    with pytest.raises(ConversionError) as raised:
        conversion.run()
    file_size_limit(-1)
    assert "could not be written: File too large" in str(raised.value)
    assert ".safetensors.partial" in str(raised.value)
    assert not list(conversion.unfinished.glob("*.partial"))  # gives the room back
    assert not destination.exists()
    assert mtimes(conversion)
    conversion.run()
    assert_bits(all_tensors(destination), tensors)


def test_a_disk_too_full_to_begin(tiny_gptj, destination: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(convert.shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10**6, 10**6, 50))
    with pytest.raises(ConversionError, match=r"too full: [0-9,]+ bytes are still to be written, 50 are free"):
        Conversion.prepare(tiny_gptj(), destination).run()
    assert not destination.exists()


# --------------------------------------------------------------------------------------------------------- memory

on_linux = pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads Linux's account of memory")

MEASURE = """
    import sys
    from pathlib import Path
    import torch
    from gptj_serve.model.checkpoint import Checkpoint
    from gptj_serve.model.convert import Conversion
    from gptj_serve.model.stage import load_stage
    def peak():
        return int(Path("/proc/self/status").read_text().split("VmHWM:")[1].split()[0]) * 1024
    arguments, before = sys.argv[1:], peak()
    {work}
    print(before, peak())
"""
CONVERT = MEASURE.format(work="Conversion.prepare(Path(arguments[0]), Path(arguments[1]), *arguments[2:]).run()")
LOAD = MEASURE.format(
    work="""
    stage = load_stage(
        Checkpoint.open(Path(arguments[0])), range(*map(int, arguments[1:])), torch.bfloat16, torch.device("cpu")
    )"""
)


def peak_memory(code: str, *arguments: object) -> tuple[int, int]:
    """Bytes resident at most, in a process of its own: before and after the work."""
    result = in_subprocess(code, *arguments)
    assert not result.returncode, result.stderr
    before, after = result.stdout.split()
    return int(before), int(after)


def make_random_pickle(directory: Path, **config: int) -> Tensors:
    raw = {"model_type": "gptj", "n_head": 16, **config}
    model = Model(GPTJConfig.from_dict(raw))
    shapes = model.shapes(range(model.config.n_layer))
    tensors = {f"transformer.{name}".replace("transformer.lm", "lm"): torch.randn(s) for name, s in shapes.items()}
    directory.mkdir()
    (directory / "config.json").write_text(json.dumps(raw))
    torch.save(tensors, directory / PICKLE_FILE)
    return tensors


def assert_cast(directory: Path, tensors: Tensors, dtype: torch.dtype) -> None:
    """As `assert_bits`, holding one shard at a time."""
    names = set()
    for file in directory.glob("*.safetensors"):
        for name, tensor in load_file(file).items():
            assert torch.equal(tensor.view(torch.uint8), tensors[name].to(dtype).view(torch.uint8)), name
            names.add(name)
    assert names == tensors.keys()


@pytest.fixture
def roomy(tmp_path: Path) -> Iterator[Path]:
    """A directory whose gigabytes don't stay behind, as pytest's own would."""
    yield tmp_path
    shutil.rmtree(tmp_path)


@on_linux
def test_memory_grows_neither_with_the_model_nor_beyond_a_stage(roomy: Path):
    """150 MB of many small tensors: converting holds a few pieces; loading a stage, its weights and a few pieces."""
    tensors = make_random_pickle(roomy / "source", n_layer=3, n_embd=1024, vocab_size=500)
    assert sum(tensor.nbytes for tensor in tensors.values()) > 150e6
    before, peak = peak_memory(CONVERT, roomy / "source", roomy / "converted")
    assert peak - before < 100e6
    assert_cast(roomy / "converted", tensors, torch.float32)
    span = range(3)
    weight_bytes = sum(
        math.prod(s) * 2 for s in Model(Checkpoint.open(roomy / "converted").config).shapes(span).values()
    )
    before, peak = peak_memory(LOAD, roomy / "converted", span.start, span.stop)
    assert peak - before < weight_bytes + 60e6


@on_linux
@pytest.mark.large
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_memory_for_2_gigabytes(roomy: Path, dtype: torch.dtype):
    """Its figures are shown by `pytest -m large -rP`."""
    tensors = make_random_pickle(roomy / "source", n_layer=7, n_embd=2048, vocab_size=50400)
    size, largest = (roomy / "source" / PICKLE_FILE).stat().st_size, max(t.nbytes for t in tensors.values())
    assert size > 2e9
    _, peak = peak_memory(CONVERT, roomy / "source", roomy / "converted", str(dtype).removeprefix("torch."))
    sys.stdout.write(f"file {size:,}, largest tensor {largest:,}, peak memory {peak:,} bytes\n")
    assert peak < largest + 1.5e9
    assert_cast(roomy / "converted", tensors, dtype)
