"""What crosses a boundary: between ingress and engine, engine and stages, stage and stage.

Frozen `msgspec` structs, so the same objects are the in-process API and, encoded as msgpack, the wire format.
Decoding checks every type and bound; nothing here is ever pickled by us.
"""

from enum import StrEnum
from typing import Annotated, Any, Self

import numpy as np
from msgspec import Meta, Struct
from numpy.typing import ArrayLike, NDArray

TokenId = Annotated[int, Meta(ge=0, lt=2**31)]
Position = Annotated[int, Meta(ge=0, lt=2**31)]
BlockId = Annotated[int, Meta(ge=0, lt=2**31)]
Seed = Annotated[int, Meta(ge=0, le=2**63 - 1)]

MAX_FRAME_BYTES = 1 << 30
"""No frame on any link is larger; a ZeroMQ peer that sends one is cut off."""


DEFAULT_HEAD = "default"
"""The name of the checkpoint's own head of a kind; heads from elsewhere have the names that the service gives them."""


class Matrix(Struct, frozen=True, array_like=True):
    """Rows of float32 numbers as raw little-endian bytes, which cost a copy where lists cost an object per number."""

    num_columns: Annotated[int, Meta(ge=1)]
    data: bytes

    @classmethod
    def of(cls, rows: ArrayLike) -> Self:
        """From anything that NumPy takes for a two-dimensional array."""
        array = np.ascontiguousarray(rows, dtype="<f4")
        return cls(array.shape[1], array.tobytes())

    @property
    def array(self) -> NDArray[np.float32]:
        """[num_rows, num_columns], read-only. Raises `ValueError` if the bytes don't make whole rows."""
        return np.frombuffer(self.data, dtype="<f4").reshape(-1, self.num_columns)

    def rows(self) -> list[list[float]]:
        values: list[list[float]] = self.array.tolist()
        return values


class SamplingParams(Struct, frozen=True, kw_only=True):
    """How the next token is chosen; names and meanings are those of transformers and vLLM.

    `temperature` 0 is greedy. `top_k` 0 and `top_p` 1 are off. The processors run in transformers' order:
    minimum length, temperature, top-k, top-p. Noise is a function of (`seed`, position) alone, so whatever is
    recomputed, in any batch on any replica, comes out the same.
    """

    max_new_tokens: Annotated[int, Meta(ge=1)]
    min_new_tokens: Annotated[int, Meta(ge=0)] = 0
    temperature: Annotated[float, Meta(ge=0)] = 0.0
    top_k: Annotated[int, Meta(ge=0)] = 0
    top_p: Annotated[float, Meta(gt=0, le=1)] = 1.0
    seed: Seed = 0
    stop_token_ids: list[TokenId] = []
    ignore_eos: bool = False


class Task(StrEnum):
    """What a request asks for, and so what runs on its last hidden state."""

    GENERATE = "generate"
    CLASSIFY = "classify"
    QA = "qa"
    EMBED = "embed"
    SCORE = "score"


class Pooling(StrEnum):
    """Which of a sequence's last hidden states (after ln_f) EMBED returns and CLASSIFY looks at."""

    LAST = "last"  # the last token's
    MEAN = "mean"  # the mean over all tokens
    ALL = "all"  # every token's


class EngineRequest(Struct, frozen=True, kw_only=True):
    """A validated, tokenized request.

    `output_token_ids` are tokens that an earlier attempt already produced: the engine goes on after them. That is
    how a request moves to another pipeline (replay). `sampling` is set exactly when the task is GENERATE,
    `continuation_token_ids` exactly when it is SCORE. `head` matters to CLASSIFY and QA, `pooling` to CLASSIFY
    (where ALL is not allowed) and EMBED.
    """

    request_id: str
    task: Task
    prompt_token_ids: Annotated[list[TokenId], Meta(min_length=1)]
    output_token_ids: list[TokenId] = []
    sampling: SamplingParams | None = None
    head: str = DEFAULT_HEAD
    pooling: Pooling = Pooling.LAST
    continuation_token_ids: list[TokenId] = []  # follow the prompt; each one's log-probability is the answer


class FinishReason(StrEnum):
    EOS = "eos"
    STOP = "stop"
    LENGTH = "length"


class TokenEvent(Struct, frozen=True, array_like=True, tag="token"):
    """One generated token. `index` counts output tokens from 0; the event with a `finish_reason` is the last."""

    request_id: str
    index: int
    token_id: int
    logprob: float
    finish_reason: FinishReason | None = None


class HeadEvent(Struct, frozen=True, array_like=True, tag="head"):
    """The only event of a request that doesn't generate.

    `values` are the logits of CLASSIFY [1, num_labels] or QA [num_tokens, 2], the hidden states of EMBED
    [1 or num_tokens, n_embd], or SCORE's log-probabilities [num_continuation_tokens, 1].
    """

    request_id: str
    values: Matrix


class FailureEvent(Struct, frozen=True, array_like=True, tag="failure"):
    """The request ended without an answer; always the last event."""

    request_id: str
    message: str


Event = TokenEvent | HeadEvent | FailureEvent


def is_terminal(event: Event) -> bool:
    """Each request ends in exactly one event for which this holds."""
    return not isinstance(event, TokenEvent) or event.finish_reason is not None


class RowOutput(StrEnum):
    """What the last stage computes for one row of a microbatch."""

    NOTHING = "nothing"  # a prompt chunk that is not the last
    SAMPLE = "sample"
    CLASSIFY = "classify"
    CLASSIFY_SUM = "classify_sum"  # the sum of all tokens' logits: the head is linear, so they add up to a mean's
    QA = "qa"
    HIDDEN_LAST = "hidden_last"  # the last token's hidden state
    HIDDEN_SUM = "hidden_sum"  # the sum over the row's tokens: chunks add up to a mean
    HIDDEN_ALL = "hidden_all"
    LOGPROBS = "logprobs"  # of `target_token_ids`


class Row(Struct, frozen=True, array_like=True):
    """One sequence's share of a microbatch: `token_ids` at positions [start, start + len(token_ids))."""

    token_ids: Annotated[list[TokenId], Meta(min_length=1)]
    start: Position
    block_table: list[BlockId]  # covers positions [0, start + len(token_ids))
    output: RowOutput = RowOutput.NOTHING
    sampling: SamplingParams | None = None  # set exactly when output is SAMPLE
    suppressed_token_ids: list[TokenId] = []  # may not be sampled now: end tokens before min_new_tokens
    head: str = DEFAULT_HEAD  # of CLASSIFY and QA
    target_token_ids: list[TokenId] = []  # of LOGPROBS: the tokens after the row's last len(target_token_ids) ones

    @property
    def end(self) -> int:
        return self.start + len(self.token_ids)


class MicroBatch(Struct, frozen=True, array_like=True):
    """All that a stage needs for one step, packed row after row. Stages run ids in order, without gaps."""

    microbatch_id: Annotated[int, Meta(ge=0)]
    rows: Annotated[list[Row], Meta(min_length=1)]

    @property
    def num_tokens(self) -> int:
        return sum(len(row.token_ids) for row in self.rows)


class SampledToken(Struct, frozen=True, array_like=True, tag="token"):
    token_id: TokenId
    logprob: float


class HeadValues(Struct, frozen=True, array_like=True, tag="values"):
    """A row's logits, hidden states or log-probabilities."""

    values: Matrix


class RowFailure(Struct, frozen=True, array_like=True, tag="failure"):
    """The numbers of this row alone went wrong; the other rows of its microbatch are sound."""

    message: str


RowResult = SampledToken | HeadValues | RowFailure | None


class StepOutput(Struct, frozen=True, array_like=True):
    """What came of a microbatch: one entry per row, in the rows' order; None where nothing was asked for."""

    microbatch_id: int
    rows: list[RowResult]


class EngineStats(Struct, frozen=True, kw_only=True):
    """A snapshot of one engine; what `/status` shows and autoscaling reads.

    `num_requests_aborted` counts those ended from outside: the client left, or the text reached a stop string.
    """

    num_running: int
    num_waiting: int
    num_microbatches_in_flight: int
    num_kv_blocks: int
    num_kv_blocks_used: int
    num_tokens_waiting: int
    num_preemptions: int
    num_tokens_generated: int
    num_requests_finished: int
    num_requests_aborted: int
    num_requests_failed: int
    num_recoveries: int

    def as_dict(self) -> dict[str, Any]:
        return {field: getattr(self, field) for field in self.__struct_fields__}
