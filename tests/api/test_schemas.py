"""No field of a request is silently ignored: each one is in a table here, and the table is proven.

A field has an effect if changing it alone changes what the engine is asked or what the client gets. Who adds a field
adds a row; `test_each_field_is_in_one_table` fails until then.
"""

from pathlib import Path
from typing import Any, get_args

import httpx
import pytest
from calls import events
from fakes import FakeEngine
from pydantic import BaseModel

from gptj_serve.api.chat_schemas import ChatCompletionRequest
from gptj_serve.api.embedding_schemas import EmbeddingRequest, EmbedRequest
from gptj_serve.api.huggingface_schemas import ClassifyRequest, GenerateRequest, QARequest
from gptj_serve.api.openai_schemas import CompletionRequest
from gptj_serve.api.sampling_schema import SamplingExtras
from gptj_serve.api.tokenization_schemas import DetokenizeRequest, TokenizeRequest

DOCUMENTATION = Path(__file__).parents[2] / "docs" / "generation.md"
CONTEXT = "Ana lives in Ljubljana with the quick brown fox, who jumps over Žofka's lazy dog all day long."

PLAIN: dict[str, tuple[str, dict[str, Any]]] = {  # model → path, smallest body
    "GenerateRequest": ("/generate", {"inputs": "The fox", "parameters": {"seed": 1}}),
    "ClassifyRequest": ("/classify", {"inputs": "The fox"}),
    "QARequest": ("/qa", {"inputs": {"question": "Where is the fox?", "context": CONTEXT}}),
    "CompletionRequest": ("/v1/completions", {"model": "tiny", "prompt": "The fox", "seed": 1}),
    "ChatCompletionRequest": (
        "/v1/chat/completions",
        {"model": "tiny", "messages": [{"role": "user", "content": "The fox"}], "seed": 1, "max_completion_tokens": 16},
    ),
    "EmbeddingRequest": ("/v1/embeddings", {"model": "tiny", "input": "The fox"}),
    "EmbedRequest": ("/embed", {"inputs": "The fox"}),
    "TokenizeRequest": ("/tokenize", {"inputs": "The fox"}),
    "DetokenizeRequest": ("/detokenize", {"tokens": [5, 6]}),
}
MODELS = (
    GenerateRequest,
    ClassifyRequest,
    QARequest,
    CompletionRequest,
    ChatCompletionRequest,
    EmbeddingRequest,
    EmbedRequest,
    TokenizeRequest,
    DetokenizeRequest,
)

EXTRAS: dict[str, tuple[Any, dict[str, Any]]] = {  # of both surfaces; as HAS_EFFECT
    "min_p": (0.1, {}),
    "typical_p": (0.9, {}),
    "epsilon_cutoff": (0.1, {}),
    "eta_cutoff": (0.1, {}),
    "repetition_penalty": (1.2, {}),
    "presence_penalty": (0.5, {}),
    "frequency_penalty": (-0.5, {}),
    "no_repeat_ngram_size": (2, {}),
    "exponential_decay_length_penalty": ([3, 1.1], {}),
    "sequence_bias": ([[[5], 1.0]], {}),
    "guidance_scale": (1.5, {}),
    "negative_prompt": ("The dog", {"guidance_scale": 1.5}),
    "bad_words": (["dog"], {}),
    "bad_words_ids": ([[5]], {}),
    "allowed_token_ids": ([5], {}),
    "suppress_tokens": ([5], {}),
    "begin_suppress_tokens": ([5], {}),
    "forced_bos_token_id": (5, {}),
    "forced_eos_token_id": (5, {}),
    "stop_token_ids": ([5], {}),
    "ignore_eos": (True, {}),
    "max_time": (1.5, {}),
    "prompt_lookup_num_tokens": (3, {}),
    "max_matching_ngram_size": (3, {"prompt_lookup_num_tokens": 3}),
    "priority": (-1, {}),
    "cache_salt": ("pepper", {}),
}
BEAM_EXTRAS: dict[str, Any] = {"length_penalty": 2.0, "early_stopping": True}

SCRIPTED = [{"role": "user", "content": "scripted"}]
OPENAI_SAMPLING: dict[str, tuple[Any, dict[str, Any]]] = {  # of OpenAI's two generating routes
    "temperature": (0.5, {}),
    "top_p": (0.5, {}),
    "n": (2, {}),
    "seed": (2, {}),
    "logit_bias": ({"5": 1.0}, {}),
    "stream": (True, {}),
    "stream_options.include_usage": (True, {"stream": True}),
    "stream_options.continuous_usage_stats": (True, {"stream": True, "stream_options.include_usage": True}),
    "response_format.type": ("json_object", {"response_format": {"type": "text"}}),
    "response_format.value": ({"type": "array"}, {"response_format": {"type": "json_object"}}),
    "response_format.json_schema.schema": (
        {"type": "array"},
        {"response_format": {"type": "json_schema", "json_schema": {"schema": {}}}},
    ),
    "top_k": (5, {}),
    "min_tokens": (3, {}),
    "return_token_ids": (True, {}),
    "prompt_logprobs": (0, {}),
    "truncate_prompt_tokens": (1, {}),
    "use_beam_search": (True, {"n": 2, "temperature": 0.0}),
    "structured_outputs.json": ({"type": "array"}, {}),
    "structured_outputs.json_object": (True, {}),
    "structured_outputs.regex": ("a", {}),
    "structured_outputs.choice": (["a"], {}),
    "structured_outputs.grammar": ('start: "a"', {}),
    "guided_json": ({}, {}),
    "guided_regex": ("a", {}),
    "guided_choice": (["a"], {}),
    "guided_grammar": ('start: "a"', {}),
}

HAS_EFFECT: dict[str, tuple[Any, dict[str, Any]]] = {  # field → another value, what else the body needs for it to show
    **{
        f"GenerateRequest.parameters.{name}": (value, {f"parameters.{other}": v for other, v in context.items()})
        for name, (value, context) in EXTRAS.items()
    },
    **{
        f"GenerateRequest.parameters.{name}": (value, {"parameters.num_beams": 2})
        for name, value in BEAM_EXTRAS.items()
    },
    "GenerateRequest.inputs": ("The dog", {}),
    "GenerateRequest.stream": (True, {}),
    "GenerateRequest.parameters.max_new_tokens": (3, {}),
    "GenerateRequest.parameters.min_new_tokens": (3, {}),
    "GenerateRequest.parameters.do_sample": (True, {}),
    "GenerateRequest.parameters.temperature": (0.5, {}),
    "GenerateRequest.parameters.top_k": (5, {"parameters.do_sample": True}),
    "GenerateRequest.parameters.top_p": (0.5, {"parameters.do_sample": True}),
    "GenerateRequest.parameters.seed": (2, {"parameters.do_sample": True}),
    "GenerateRequest.parameters.best_of": (2, {"parameters.do_sample": True}),
    "GenerateRequest.parameters.stop": (["mps"], {"inputs": "scripted"}),
    "GenerateRequest.parameters.truncate": (1, {}),
    "GenerateRequest.parameters.grammar.type": ("lark", {"parameters.grammar": {"type": "regex", "value": "a"}}),
    "GenerateRequest.parameters.grammar.value": ("b", {"parameters.grammar": {"type": "regex", "value": "a"}}),
    "GenerateRequest.parameters.num_beams": (2, {}),
    "GenerateRequest.parameters.num_return_sequences": (2, {"parameters.num_beams": 2}),
    "GenerateRequest.parameters.return_full_text": (True, {}),
    "GenerateRequest.parameters.details": (True, {}),
    "GenerateRequest.parameters.top_n_tokens": (3, {}),
    "GenerateRequest.parameters.decoder_input_details": (True, {}),
    "ClassifyRequest.inputs": ("The dog", {}),
    "ClassifyRequest.parameters.top_k": (1, {}),
    "ClassifyRequest.parameters.function_to_apply": ("sigmoid", {}),
    "ClassifyRequest.model": ("tone", {}),
    "ClassifyRequest.parameters.candidate_labels": (["animal", "plant"], {}),
    "ClassifyRequest.parameters.hypothesis_template": ("{}!", {"parameters.candidate_labels": "animal, plant"}),
    "ClassifyRequest.parameters.multi_label": (True, {"parameters.candidate_labels": "animal, plant"}),
    "QARequest.model": ("reader", {}),
    "QARequest.inputs.question": ("Where is the dog?", {}),
    "QARequest.inputs.context": ("The dog is here.", {}),
    "QARequest.parameters.top_k": (2, {}),
    "QARequest.parameters.doc_stride": (1, {}),
    "QARequest.parameters.max_seq_len": (32, {}),
    "QARequest.parameters.max_question_len": (3, {}),
    "QARequest.parameters.max_answer_len": (1, {"parameters.top_k": 50}),
    "QARequest.parameters.handle_impossible_answer": (True, {"parameters.top_k": 1000}),
    "QARequest.parameters.align_to_words": (False, {"parameters.top_k": 50}),
    **{f"CompletionRequest.{name}": row for name, row in EXTRAS.items()},
    **{f"CompletionRequest.{name}": (value, {"use_beam_search": True, "n": 2}) for name, value in BEAM_EXTRAS.items()},
    **{f"CompletionRequest.{name}": row for name, row in OPENAI_SAMPLING.items()},
    "CompletionRequest.prompt": ("The dog", {}),
    "CompletionRequest.max_tokens": (3, {}),
    "CompletionRequest.best_of": (2, {}),
    "CompletionRequest.stop": ("mps", {"prompt": "scripted"}),
    "CompletionRequest.echo": (True, {}),
    "CompletionRequest.logprobs": (0, {}),
    "CompletionRequest.include_stop_str_in_output": (True, {"prompt": "scripted", "stop": "mps"}),
    **{f"ChatCompletionRequest.{name}": row for name, row in EXTRAS.items()},
    **{
        f"ChatCompletionRequest.{name}": (value, {"use_beam_search": True, "n": 2})
        for name, value in BEAM_EXTRAS.items()
    },
    **{f"ChatCompletionRequest.{name}": row for name, row in OPENAI_SAMPLING.items()},
    "ChatCompletionRequest.stop": ("mps", {"messages": SCRIPTED}),
    "ChatCompletionRequest.include_stop_str_in_output": (True, {"messages": SCRIPTED, "stop": "mps"}),
    "ChatCompletionRequest.messages": ([{"role": "user", "content": "The dog"}], {}),
    "ChatCompletionRequest.max_tokens": (3, {"max_completion_tokens": None}),
    "ChatCompletionRequest.max_completion_tokens": (3, {}),
    "ChatCompletionRequest.logprobs": (True, {}),
    "ChatCompletionRequest.top_logprobs": (2, {"logprobs": True}),
    "ChatCompletionRequest.add_generation_prompt": (False, {}),
    "ChatCompletionRequest.continue_final_message": (True, {}),
    "ChatCompletionRequest.chat_template_kwargs": ({"end": "!"}, {}),
    "EmbeddingRequest.input": ("The dog", {}),
    "EmbeddingRequest.encoding_format": ("base64", {}),
    "EmbeddingRequest.pooling": ("last", {}),
    "EmbeddingRequest.normalize": (False, {}),
    "EmbeddingRequest.truncate_prompt_tokens": (1, {}),
    "EmbedRequest.inputs": ("The dog", {}),
    "EmbedRequest.normalize": (False, {}),
    "EmbedRequest.truncation_direction": ("left", {"inputs": "The quick brown fox. " * 20, "truncate": True}),
    "EmbedRequest.pooling": ("last", {}),
    "TokenizeRequest.inputs": ("The dog", {}),
    "TokenizeRequest.prompt": ("The dog", {"inputs": None, "prompt": "The fox"}),
    "TokenizeRequest.messages": (
        [{"role": "user", "content": "The dog"}],
        {"inputs": None, "messages": [{"role": "user", "content": "The fox"}]},
    ),
    "TokenizeRequest.return_token_strs": (True, {"inputs": None, "prompt": "The fox"}),
    **{
        f"TokenizeRequest.{name}": (value, {"inputs": None, "messages": [{"role": "user", "content": "The fox"}]})
        for name, value in {
            "add_generation_prompt": False,
            "continue_final_message": True,
            "chat_template_kwargs": {"end": "!"},
        }.items()
    },
    "DetokenizeRequest.tokens": ([5], {}),
}

REFUSED: dict[str, tuple[Any, list[Any]]] = {  # field → a value that asks for something, values that ask for nothing
    "GenerateRequest.parameters.adapter_id": ("lora", [None]),
    "GenerateRequest.parameters.watermark": (True, [None, False]),
    "CompletionRequest.watermark": (True, [None, False]),
    "CompletionRequest.suffix": ("end", [None, ""]),
    "ChatCompletionRequest.watermark": (True, [None, False]),
    "ChatCompletionRequest.chat_template": ("{{ messages }}", [None]),
    "ChatCompletionRequest.modalities": (["text", "audio"], [None, ["text"]]),
    "ChatCompletionRequest.service_tier": ("flex", [None, "auto", "default"]),
    "ChatCompletionRequest.store": (True, [None, False]),
    "ChatCompletionRequest.tools": ([{"type": "function"}], [None, []]),
    "ChatCompletionRequest.tool_choice": ("required", [None, "none", "auto"]),
    "ChatCompletionRequest.functions": ([{"name": "f"}], [None, []]),
    "ChatCompletionRequest.function_call": ({"name": "f"}, [None, "none", "auto"]),
    "ChatCompletionRequest.audio": ({"voice": "alloy"}, [None]),
    "ChatCompletionRequest.prediction": ({"type": "content"}, [None]),
    "ChatCompletionRequest.reasoning_effort": ("low", [None, "none"]),
    "ChatCompletionRequest.verbosity": ("low", [None]),
    "ChatCompletionRequest.web_search_options": ({}, [None]),
    "EmbedRequest.prompt_name": ("query", [None]),
    "EmbedRequest.encoding_format": ("base64", [None, "float"]),
    "TokenizeRequest.chat_template": ("{{ messages }}", [None]),
}

ELSEWHERE = {
    **{
        f"{model}.{name}": why
        for model in ("CompletionRequest", "ChatCompletionRequest")
        for name, why in {
            "model": "test_bad_input.test_an_unknown_model_is_not_found, test_chat",
            "user": "the caller's own label; it has no effect by definition",
            "response_format.json_schema.name": "a label",
            "response_format.json_schema.description": "a label",
            "response_format.json_schema.strict": "the schema is always followed",
        }.items()
    },
    "ChatCompletionRequest.metadata": "the caller's own labels",
    "ChatCompletionRequest.safety_identifier": "the caller's own label",
    "ChatCompletionRequest.prompt_cache_key": "tells where to look for what is found by itself",
    "ChatCompletionRequest.parallel_tool_calls": "of no tools",
    "EmbeddingRequest.model": "as in completions",
    "EmbeddingRequest.user": "the caller's own label",
    "EmbeddingRequest.dimensions": "test_embeddings.test_refusals",
    "EmbedRequest.dimensions": "test_embeddings.test_refusals",
    "EmbedRequest.truncate": "test_embeddings.test_as_many_as_fit",
    "TokenizeRequest.model": "test_tokenize_routes.test_refusals",
    "TokenizeRequest.add_special_tokens": "GPT-J's tokenizer adds none",
    "DetokenizeRequest.model": "test_tokenize_routes.test_refusals",
}
LISTS = {"messages": "test_chat.test_prompt"}
"""Fields that are lists of objects, whose own fields are tested elsewhere."""


def _fields(model: type[BaseModel], prefix: str) -> list[str]:
    names: list[str] = []
    for name, field in model.model_fields.items():
        path = f"{prefix}.{field.alias or name}"
        candidates = [field.annotation, *get_args(field.annotation)]
        if name in LISTS:
            names.append(path)
            continue
        parts = [part for part in candidates if isinstance(part, type) and issubclass(part, BaseModel)]
        names += _fields(parts[0], path) if parts else [path]
    return names


def test_each_field_is_in_one_table() -> None:
    fields = [field for model in MODELS for field in _fields(model, model.__name__)]
    assert sorted(fields) == sorted([*HAS_EFFECT, *REFUSED, *ELSEWHERE])


def test_both_surfaces_take_the_same_extras() -> None:
    assert {*EXTRAS, *BEAM_EXTRAS, "watermark"} == set(SamplingExtras.model_fields)


@pytest.mark.parametrize("model", [GenerateRequest, CompletionRequest, ChatCompletionRequest])
def test_each_generation_parameter_is_documented(model: type[BaseModel]) -> None:
    text = DOCUMENTATION.read_text(encoding="utf-8")
    names = {
        field.removeprefix(f"{model.__name__}.").removeprefix("parameters.") for field in _fields(model, model.__name__)
    }
    names -= {"model", "user", "stream", "stream_options.include_usage", "stream_options.continuous_usage_stats"}
    assert {name for name in names if f"`{name.partition('.')[0]}`" not in text} == set()


def _with(body: dict[str, Any], path: str, value: Any) -> dict[str, Any]:
    """A copy of `body` with the field at a dotted path set."""
    name, _, rest = path.partition(".")
    return body | {name: _with(body.get(name, {}), rest, value) if rest else value}


async def _observe(client: httpx.AsyncClient, engine: FakeEngine, path: str, body: dict[str, Any]) -> Any:
    """What a request does: what the engine is asked, and what comes back."""
    engine.script |= {"scripted": " jumps over", "u>scripted|a>": " jumps over"}
    engine.requests.clear()
    response = await client.post(path, json=body)
    assert response.status_code == 200, response.text
    streamed = response.headers["content-type"].startswith("text/event-stream")
    answer = events(response) if streamed else [response.json()]
    for part in answer:
        if isinstance(part, dict):
            part.pop("id", None)
            part.pop("created", None)
    asked = [
        (r.task, r.prompt_token_ids, r.continuation_token_ids, r.head, r.pooling, r.sampling, r.priority, r.cache_salt)
        for r in engine.requests
    ]
    return streamed, answer, asked


@pytest.mark.parametrize("field", HAS_EFFECT)
async def test_a_field_has_an_effect(client: httpx.AsyncClient, engine: FakeEngine, field: str) -> None:
    model, _, name = field.partition(".")
    path, body = PLAIN[model]
    value, context = HAS_EFFECT[field]
    for other, other_value in context.items():
        body = _with(body, other, other_value)
    plain = await _observe(client, engine, path, body)
    assert plain == await _observe(client, engine, path, body), "the field alone makes the difference"
    assert plain != await _observe(client, engine, path, _with(body, name, value))


NULLABLE = [
    f"{model}{name}"
    for model in ("GenerateRequest.parameters.", "CompletionRequest.", "ChatCompletionRequest.")
    for name in SamplingExtras.model_fields
]


@pytest.mark.parametrize("field", NULLABLE)
async def test_null_is_the_default(client: httpx.AsyncClient, engine: FakeEngine, field: str) -> None:
    model, _, name = field.partition(".")
    path, body = PLAIN[model]
    plain = await _observe(client, engine, path, body)
    assert await _observe(client, engine, path, _with(body, name, None)) == plain


@pytest.mark.parametrize("field", REFUSED)
async def test_an_unsupported_field_is_refused_by_name_unless_it_is_off(
    client: httpx.AsyncClient, engine: FakeEngine, field: str
) -> None:
    model, _, name = field.partition(".")
    path, body = PLAIN[model]
    value, off_values = REFUSED[field]
    plain = await _observe(client, engine, path, body)
    for off_value in off_values:
        assert await _observe(client, engine, path, _with(body, name, off_value)) == plain
    engine.requests.clear()
    response = await client.post(path, json=_with(body, name, value))
    error = response.json()["error"]
    if path.startswith("/v1/"):
        assert (response.status_code, error["param"]) == (400, name)
        error = error["message"]
    else:
        assert response.status_code == 422
    assert error == f"{name}={value!r}: is not supported"
    assert engine.requests == []
