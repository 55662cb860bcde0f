"""Pairs of models: transformers' class and ours with the same random weights, and how to compare what they return."""

from typing import Any

import torch
import transformers
from torch import Tensor, nn

import gptj_serve

TINY: dict[str, Any] = {
    "vocab_size": 61,
    "n_positions": 32,
    "n_embd": 16,
    "n_layer": 2,
    "n_head": 2,
    "rotary_dim": 4,
    "bos_token_id": 0,
    "eos_token_id": 0,
    "pad_token_id": 60,
}
CLASSES = ["GPTJModel", "GPTJForCausalLM", "GPTJForSequenceClassification", "GPTJForQuestionAnswering"]


def pair(name: str, seed: int = 0, **config: Any) -> tuple[Any, Any]:
    """(transformers' model with eager attention, ours), in eval mode. Weights are large enough for each to matter."""
    values = {**TINY, **config}
    theirs = getattr(transformers, name)(transformers.GPTJConfig(**values, attn_implementation="eager")).eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter_name, parameter in theirs.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.copy_(0.3 * noise + parameter_name.endswith(("ln_1.weight", "ln_f.weight")))
    ours = getattr(gptj_serve, name)(gptj_serve.GPTJConfig(**values)).eval()
    ours.load_state_dict(theirs.state_dict())
    return theirs, ours


def assert_same_output(ours: Any, theirs: Any, tolerance: float = 1e-5) -> None:
    """The same keys in the same order and numbers within tolerance, whether outputs or tuples."""
    if hasattr(theirs, "keys"):
        assert list(ours) == list(theirs)
        ours, theirs = ours.to_tuple(), theirs.to_tuple()
    assert len(ours) == len(theirs)
    for mine, reference in zip(ours, theirs, strict=True):
        if isinstance(reference, Tensor):
            torch.testing.assert_close(mine, reference, atol=tolerance, rtol=tolerance, equal_nan=True)
        elif isinstance(reference, transformers.Cache):
            assert mine.get_seq_length() == reference.get_seq_length()
            layers = [(layer.keys, layer.values) for layer in reference.layers]
            assert_same_output(tuple(x for kv in mine for x in kv), tuple(x for kv in layers for x in kv), tolerance)
        else:
            assert_same_output(mine, reference, tolerance)


def assert_same_gradients(ours: nn.Module, theirs: nn.Module, tolerance: float = 1e-4) -> None:
    references = dict(theirs.named_parameters())
    for name, parameter in ours.named_parameters():
        reference = references[name].grad
        assert (parameter.grad is None) == (reference is None), name
        if reference is not None and parameter.grad is not None:
            assert torch.allclose(parameter.grad, reference, atol=tolerance, rtol=tolerance), (
                f"{name}: gradients differ by {(parameter.grad - reference).abs().max()}"
            )
