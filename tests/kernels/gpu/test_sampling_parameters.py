"""What rows the device's sampler takes, and how they are described to it."""

import math

import numpy as np
import pytest
import torch

from gptj_serve.kernels.gpu.sampling_parameters import Field, SamplingMode, can_sample_on_device, write_parameters
from gptj_serve.steps import LogitEdits, SampleSpec
from gptj_serve.types import Warpers


@pytest.mark.parametrize(
    "spec",
    [
        SampleSpec(),
        SampleSpec(Warpers(temperature=0.7, top_k=5, top_p=0.9, min_p=0.1), seed=2**63 - 1),
        SampleSpec(Warpers(temperature=0.0, typical_p=0.5)),  # greedy, whatever else is set
        SampleSpec(Warpers(temperature=2.0, top_k=1, epsilon_cutoff=0.1)),
    ],
)
def test_tokens_that_the_device_chooses(spec: SampleSpec):
    assert can_sample_on_device(spec)


@pytest.mark.parametrize(
    "spec",
    [
        SampleSpec(edits=LogitEdits(banned_token_ids=[1])),
        SampleSpec(num_top_logprobs=1),
        SampleSpec(guidance_scale=1.5),
        SampleSpec(num_candidates=4),
        SampleSpec(Warpers(temperature=1.0, typical_p=0.5)),
        SampleSpec(Warpers(temperature=1.0, epsilon_cutoff=0.1)),
        SampleSpec(Warpers(temperature=1.0, eta_cutoff=0.1)),
    ],
)
def test_tokens_that_the_host_chooses(spec: SampleSpec):
    assert not can_sample_on_device(spec)


DRAWN = SampleSpec(Warpers(temperature=0.5), seed=7)


@pytest.mark.parametrize(
    ("specs", "mode"),
    [
        ([], SamplingMode.GREEDY),
        ([SampleSpec(), SampleSpec(Warpers(temperature=1.0, top_k=1, top_p=0.5))], SamplingMode.GREEDY),
        ([SampleSpec(), DRAWN], SamplingMode.DRAWN),
        ([DRAWN, SampleSpec(Warpers(temperature=1.0, top_k=2))], SamplingMode.NARROWED),
        ([SampleSpec(Warpers(temperature=1.0, top_p=0.99))], SamplingMode.NARROWED),
        ([SampleSpec(Warpers(temperature=1.0, min_p=0.01)), SampleSpec()], SamplingMode.NARROWED),
    ],
)
def test_mode_is_the_least_that_serves_all_rows(specs: list[SampleSpec], mode: SamplingMode):
    table = torch.empty(len(Field), 3, dtype=torch.int64)
    assert write_parameters(table, specs, [0] * len(specs)) is mode


def test_table_holds_each_rows_numbers_and_padding_is_greedy():
    table = torch.full((len(Field), 4), -1, dtype=torch.int64)
    warpers = Warpers(temperature=1e-300, top_k=40, top_p=0.9, min_p=0.25)
    write_parameters(table, [SampleSpec(seed=5), SampleSpec(warpers, seed=2**63 - 1), DRAWN], [1, 2, 3])
    reals = table.numpy().view(np.float64)
    assert table[Field.SEED].tolist() == [0, 2**63 - 1, 7, 0]
    assert table[Field.POSITION].tolist() == [0, 2, 3, 0]
    assert table[Field.TOP_K].tolist() == [0, 40, 0, 0]
    assert reals[Field.TEMPERATURE].tolist() == [0, 1e-37, 0.5, 0]
    assert reals[Field.TOP_P].tolist() == [0, 0.9, 1, 0]
    assert reals[Field.LOG_MIN_P].tolist() == [0, pytest.approx(math.log(0.25)), -math.inf, 0]
