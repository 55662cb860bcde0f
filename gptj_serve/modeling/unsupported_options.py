"""What transformers' `generate` also takes and this one does not follow, each with the reason."""

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from gptj_serve.errors import InvalidOptionError

_CACHE = "the engine keeps keys and values in blocks of its own"
_COMPILE = "what the engine runs is not compiled"
_DRAFTS = "drafts come from the prompt (prompt_lookup_num_tokens), not from another model"
_DEPRECATED = "transformers itself leaves it to code from the hub"
_EMBEDDINGS = "a prompt is token ids: input_ids and attention_mask"
_ENCODER = "is for models with an encoder"
_PYTHON = "the engine calls nobody between two tokens; its own processors have names"
_STATES = "generate keeps none: model(sequences, …) returns them"

UNSUPPORTED: Mapping[str, tuple[tuple[Any, ...], str]] = {
    "assistant_confidence_threshold": ((0.4,), _DRAFTS),
    "assistant_early_exit": ((), _DRAFTS),
    "assistant_ensemble_weight": ((), _DRAFTS),
    "assistant_lookbehind": ((10,), _DRAFTS),
    "assistant_model": ((), _DRAFTS),
    "assistant_tokenizer": ((), _DRAFTS),
    "cache": ((), _CACHE),
    "cache_config": ((), _CACHE),
    "cache_implementation": ((), _CACHE),
    "compile_config": ((), _COMPILE),
    "constraints": (([],), _DEPRECATED),
    "continuous_batching_config": ((), "rows are batched continuously anyway"),
    "custom_generate": ((), "runs no code from elsewhere"),
    "decoder_input_ids": ((), _ENCODER),
    "decoder_start_token_id": ((), _ENCODER),
    "diversity_penalty": ((0.0,), _DEPRECATED),
    "dola_layers": ((), _DEPRECATED),
    "encoder_no_repeat_ngram_size": ((0,), "no_repeat_ngram_size looks at prompt and output alike"),
    "encoder_repetition_penalty": ((1.0,), "repetition_penalty looks at prompt and output alike"),
    "force_words_ids": (([],), _DEPRECATED),
    "inputs_embeds": ((), _EMBEDDINGS),
    "is_assistant": ((False,), _DRAFTS),
    "logits_processor": (([],), _PYTHON),
    "low_memory": ((False,), _DEPRECATED),
    "max_cache_len": ((), _CACHE),
    "num_assistant_tokens": ((20,), _DRAFTS),
    "num_assistant_tokens_schedule": (("constant", "heuristic"), _DRAFTS),
    "num_beam_groups": ((1,), _DEPRECATED),
    "output_attentions": ((False,), _STATES),
    "output_hidden_states": ((False,), _STATES),
    "past_key_values": ((), _CACHE),
    "penalty_alpha": ((0.0,), _DEPRECATED),
    "position_ids": ((), _EMBEDDINGS),
    "prefill_chunk_size": ((), "the engine cuts long prompts by itself"),
    "prefix_allowed_tokens_fn": ((), _PYTHON),
    "speculation_type": ((), _DRAFTS),
    "stopping_criteria": (([],), _PYTHON),
    "synced_gpus": ((False,), "a model lies on one device"),
    "target_lookbehind": ((10,), _DRAFTS),
    "token_healing": ((False,), "prompts are taken as they are"),
    "token_type_ids": ((), _EMBEDDINGS),
    "top_h": ((), "the sampler lacks it"),
    "trust_remote_code": ((False,), "runs no code from elsewhere"),
    "use_mtp": ((False,), _DRAFTS),
    "watermarking_config": ((), "the sampler lacks it"),
}
"""By name: values that ask for nothing, as None always does, and why others can't be followed."""


def without_inert(options: Mapping[str, Any]) -> dict[str, Any]:
    """The options that are followed. Raises `InvalidOptionError` for one of the table that asks for something."""
    followed = {}
    for name, value in options.items():
        if name not in UNSUPPORTED:
            followed[name] = value
        elif value is not None and (isinstance(value, Tensor) or value not in UNSUPPORTED[name][0]):
            raise InvalidOptionError(name, value, f"generate() does not follow it: {UNSUPPORTED[name][1]}")
    return followed
