"""Embeddings: what the model makes of a text, as one vector of its width.

A GPT-J is not trained to embed. By default the vector is the mean of its last hidden states (after ln_f) over all
tokens, scaled to length 1, which is what sentence-transformers makes of a model that says nothing of it.
"""

import base64
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from gptj_serve.api.embedding_schemas import EmbeddingRequest, EmbedRequest, Inputs
from gptj_serve.api.json_answers import encode_answer
from gptj_serve.api.openai_responses import Embedding, EmbeddingList
from gptj_serve.api.service import Service, off_loop, run_all
from gptj_serve.errors import InvalidRequestError, RequestFailedError
from gptj_serve.types import Pooling, Task


async def openai_embeddings(service: Service, body: EmbeddingRequest) -> bytes:
    """An `EmbeddingList` as JSON, in the order of the inputs."""
    inputs = _as_list(body.input)
    _check(service, inputs, body.dimensions, "input")
    kept = body.truncate_prompt_tokens
    num_last = None if kept is None else -service.model.n_positions if kept == -1 else -kept
    prompts = [await _tokens(service, item, "input", num_last) for item in inputs]
    vectors = await _embed(service, prompts, Pooling(body.pooling), normalize=body.normalize)
    num_tokens = sum(map(len, prompts))

    def answer() -> bytes:
        whole: EmbeddingList = {
            "object": "list",
            "data": [_embedding(index, vector, body.encoding_format) for index, vector in enumerate(vectors)],
            "model": service.config.served_name,
            "usage": {"prompt_tokens": num_tokens, "total_tokens": num_tokens},
        }
        return encode_answer(whole)

    return await off_loop(_num_values(vectors), answer)


async def embed(service: Service, body: EmbedRequest) -> list[list[float]]:
    """A vector per input, also for a single one."""
    vectors = await _embed_inputs(service, body)
    return await off_loop(_num_values(vectors), lambda: [vector.tolist() for vector in vectors])


async def embed_to_json(service: Service, body: EmbedRequest) -> bytes:
    vectors = await _embed_inputs(service, body)
    return await off_loop(_num_values(vectors), lambda: encode_answer(vector.tolist() for vector in vectors))


async def _embed_inputs(service: Service, body: EmbedRequest) -> list[NDArray[np.float32]]:
    inputs = _as_list(body.inputs)
    _check(service, inputs, body.dimensions, "inputs")
    longest = service.model.n_positions
    kept = None if not body.truncate else longest if body.truncation_direction.lower() == "right" else -longest
    prompts = [await _tokens(service, item, "inputs", kept) for item in inputs]
    return await _embed(service, prompts, Pooling(body.pooling), normalize=body.normalize)


def _num_values(vectors: Sequence[NDArray[np.float32]]) -> int:
    return sum(vector.size for vector in vectors)


def _as_list(inputs: Inputs) -> Sequence[str | list[int]]:
    if isinstance(inputs, str):
        return [inputs]
    if isinstance(inputs[0], int):
        return [inputs]
    return inputs


def _check(service: Service, inputs: Sequence[str | list[int]], dimensions: int | None, field: str) -> None:
    service.check_batch(inputs, field)
    width = service.model.n_embd
    if dimensions is not None and dimensions != width:
        raise InvalidRequestError("dimensions", dimensions, f"the model's vectors have {width}")


async def _tokens(service: Service, item: str | list[int], field: str, kept: int | None) -> list[int]:
    """The input's tokens; with `kept`, of more of them so many first ones, or, if negative, last ones."""
    if isinstance(item, str):
        token_ids = await service.encode(item, field, is_truncated=kept is not None)
    else:
        token_ids = service.check_token_ids(item, field)
    if kept is not None:
        token_ids = token_ids[:kept] if kept > 0 else token_ids[kept:]
    if len(token_ids) > service.model.n_positions:
        reason = f"has {len(token_ids)} tokens; the model's context is {service.model.n_positions}"
        raise InvalidRequestError(field, item, reason)
    return token_ids


async def _embed(
    service: Service, prompts: Sequence[list[int]], pooling: Pooling, *, normalize: bool
) -> list[NDArray[np.float32]]:
    made = await run_all([service.values(Task.EMBED, token_ids, pooling=pooling) for token_ids in prompts])
    vectors = [matrix.array[0] for matrix in made]
    if not all(np.isfinite(vector).all() for vector in vectors):
        raise RequestFailedError("the model's hidden states are not finite")
    return [_normalized(vector) for vector in vectors] if normalize else vectors


def _normalized(vector: NDArray[np.float32]) -> NDArray[np.float32]:
    """Of length 1; nothing stays nothing."""
    length = float(np.linalg.norm(vector.astype(np.float64)))
    return vector if length == 0 else (vector / length).astype(np.float32)


def _embedding(index: int, vector: NDArray[np.float32], encoding_format: str | None) -> Embedding:
    numbers = base64.b64encode(vector.astype("<f4").tobytes()).decode() if encoding_format == "base64" else None
    return {"object": "embedding", "index": index, "embedding": vector.tolist() if numbers is None else numbers}
