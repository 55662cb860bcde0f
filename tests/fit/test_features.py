"""Features equal transformers' hidden states, and the cache survives being broken off anywhere."""

from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import GPTJModel

from gptj_serve.errors import DataError
from gptj_serve.fit.features import FeatureCache, FeatureConfig, compute_features, key_of, open_cache
from gptj_serve.model.checkpoint import Checkpoint
from gptj_serve.types import Pooling


@pytest.fixture
def checkpoint(tiny_gptj) -> Checkpoint:
    return Checkpoint.open(tiny_gptj())


@pytest.mark.parametrize("num_stages", [1, 3])
async def test_features_are_the_hidden_states(checkpoint: Checkpoint, tmp_path: Path, num_stages: int):
    model = GPTJModel.from_pretrained(checkpoint.directory).eval()
    sequences = [[i + 1, 2 * i + 3, 5][: 1 + i % 3] + [7] * i for i in range(20)]
    for pooling, tolerance in ((Pooling.LAST, 1e-5), (Pooling.ALL, 5e-3)):  # whole sequences are kept as float16
        config = FeatureConfig(num_stages=num_stages, pooling=pooling)
        with open_cache(tmp_path, checkpoint, config) as cache:
            await compute_features(checkpoint, config, cache, sequences + sequences)
            for ids in sequences:
                with torch.inference_mode():
                    hidden = model(torch.tensor([ids])).last_hidden_state[0].numpy()
                wanted = hidden if pooling is Pooling.ALL else hidden[-1:]
                np.testing.assert_allclose(cache[key_of(ids)], wanted, atol=tolerance)


async def test_a_second_run_computes_only_what_is_missing(
    checkpoint: Checkpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    config = FeatureConfig()
    sequences = [[i, i + 1] for i in range(10)]
    with open_cache(tmp_path, checkpoint, config) as cache:
        await compute_features(checkpoint, config, cache, sequences[:6])
    sizes = [file.stat().st_size for file in tmp_path.iterdir()]
    with open_cache(tmp_path, checkpoint, config) as cache:
        await compute_features(checkpoint, config, cache, sequences)
    assert [file.stat().st_size for file in tmp_path.iterdir()] == [sizes[0] * 10 // 6]
    monkeypatch.setattr("gptj_serve.fit.features.StageRunner", None)  # no model is loaded for what is all there
    with open_cache(tmp_path, checkpoint, config) as cache:
        await compute_features(checkpoint, config, cache, sequences)


def test_a_cache_cut_off_anywhere_keeps_its_whole_records(tmp_path: Path):
    path = tmp_path / "a"
    rows = {key_of([i]): np.full((i + 1, 3), i, np.float32) for i in range(3)}
    with FeatureCache(path, 3, np.float32) as cache:
        for key, values in rows.items():
            cache.add(key, values)
    whole = path.read_bytes()
    ends = np.cumsum([0] + [36 + values.nbytes for values in rows.values()])
    assert ends[-1] == len(whole)
    for size in range(len(whole) + 1):
        path.write_bytes(whole[:size])
        with FeatureCache(path, 3, np.float32) as cache:
            kept = [key for key in rows if key in cache]
            assert len(kept) == int((ends[1:] <= size).sum())
            for key in list(rows)[len(kept) :]:
                cache.add(key, rows[key])
            for key, values in rows.items():
                np.testing.assert_array_equal(cache[key], values)
        assert path.read_bytes() == whole


def test_a_cache_belongs_to_one_run_at_a_time(tmp_path: Path):
    with FeatureCache(tmp_path / "a", 3, np.float32), pytest.raises(DataError, match="a: is in use by another run"):
        FeatureCache(tmp_path / "a", 3, np.float32)


def test_a_cache_that_cannot_be_opened_or_written_is_named(tmp_path: Path):
    (tmp_path / "file").write_text("")
    with pytest.raises(DataError, match="file/a: can't be opened"):
        FeatureCache(tmp_path / "file" / "a", 3, np.float32)
    with FeatureCache(Path("/dev/full"), 3, np.float32) as cache, pytest.raises(DataError, match="can't be written"):
        cache.add(key_of([1]), np.ones((1, 3), np.float32))


def test_backbone_dtype_and_pooling_have_caches_of_their_own(checkpoint: Checkpoint, tiny_gptj, tmp_path: Path):
    for directory, config in (
        (checkpoint.directory, FeatureConfig()),
        (checkpoint.directory, FeatureConfig(dtype=torch.float16)),
        (checkpoint.directory, FeatureConfig(pooling=Pooling.ALL)),
        (tiny_gptj(n_head=2), FeatureConfig()),
        (checkpoint.directory, FeatureConfig(num_stages=3)),  # the split changes nothing
    ):
        open_cache(tmp_path, Checkpoint.open(directory), config).__exit__()
    assert len(list(tmp_path.iterdir())) == 4
