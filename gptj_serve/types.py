"""What crosses the boundary between ingress and engine: requests, and the events that answer them.

Frozen `msgspec` structs, so the same objects are the in-process API and, encoded as msgpack, the wire format.
Decoding checks every type and bound; nothing here is ever pickled by us. `steps` has what the engine and the stages
tell each other.
"""

from enum import StrEnum
from typing import Annotated, Any, Self

import numpy as np
from msgspec import Meta, Struct
from numpy.typing import ArrayLike, NDArray

TokenId = Annotated[int, Meta(ge=0, lt=2**31)]
Seed = Annotated[int, Meta(ge=0, le=2**63 - 1)]


MAX_PRIORITY = 1000
PRIORITY_STEP = 256

MIN_BEAMS = 2
MAX_BEAMS = 64
MAX_DRAFT_TOKENS = 64


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


class GrammarKind(StrEnum):
    """How a constraint on the output is written."""

    JSON_SCHEMA = "json_schema"
    REGEX = "regex"
    CHOICE = "choice"  # a JSON array of strings
    LARK = "lark"  # llguidance's dialect of Lark


class Grammar(Struct, frozen=True):
    """What the generated text must match, from its first character to its last."""

    kind: GrammarKind
    text: str


class Warpers(Struct, frozen=True, array_like=True):
    """What narrows the distribution of a token that is drawn; transformers' names, meanings and order.

    `temperature` 0 is greedy, whatever the others say. The defaults are off.
    """

    temperature: Annotated[float, Meta(ge=0)] = 0.0
    top_k: Annotated[int, Meta(ge=0)] = 0
    top_p: Annotated[float, Meta(gt=0, le=1)] = 1.0
    min_p: Annotated[float, Meta(ge=0, le=1)] = 0.0
    typical_p: Annotated[float, Meta(gt=0, le=1)] = 1.0
    epsilon_cutoff: Annotated[float, Meta(ge=0, lt=1)] = 0.0
    eta_cutoff: Annotated[float, Meta(ge=0, lt=1)] = 0.0


class EarlyStopping(StrEnum):
    """When a beam search ends; transformers' `early_stopping` False, True and "never"."""

    HEURISTIC = "heuristic"
    FIRST = "first"
    NEVER = "never"


class BeamParams(Struct, frozen=True, kw_only=True):
    """Beam search with transformers' parameters."""

    num_beams: Annotated[int, Meta(ge=MIN_BEAMS, le=MAX_BEAMS)]
    length_penalty: float = 1.0
    early_stopping: EarlyStopping = EarlyStopping.HEURISTIC
    num_return_sequences: Annotated[int, Meta(ge=1)] = 1


class SamplingParams(Struct, frozen=True, kw_only=True):
    """How the next token is chosen; names and meanings are those of transformers, else of vLLM.

    The processors run in transformers' order (`steps.LogitEdits`, then `Warpers`). Noise is a function of (`seed`,
    position) alone, so whatever is recomputed, in any batch on any replica, comes out the same.
    """

    max_new_tokens: Annotated[int, Meta(ge=1)]
    min_new_tokens: Annotated[int, Meta(ge=0)] = 0
    warpers: Warpers = Warpers()
    seed: Seed = 0
    stop_token_ids: list[TokenId] = []
    ignore_eos: bool = False
    max_time_s: Annotated[float, Meta(gt=0)] | None = None  # from the request's arrival at the engine

    sequence_bias: list[tuple[Annotated[list[TokenId], Meta(min_length=1)], float]] = []  # biases on the last token
    repetition_penalty: Annotated[float, Meta(gt=0)] = 1.0  # of tokens in prompt or output
    presence_penalty: float = 0.0  # of tokens in the output
    frequency_penalty: float = 0.0  # for each time that a token is in the output
    no_repeat_ngram_size: Annotated[int, Meta(ge=0)] = 0
    bad_words_ids: list[Annotated[list[TokenId], Meta(min_length=1)]] = []
    allowed_token_ids: Annotated[list[TokenId], Meta(min_length=1)] | None = None
    suppress_tokens: list[TokenId] = []
    begin_suppress_tokens: list[TokenId] = []  # not as the first new token
    forced_bos_token_id: TokenId | None = None  # after a prompt of one token, as in transformers
    forced_eos_token_id: list[TokenId] = []  # as the token that reaches max_new_tokens
    exponential_decay_length_penalty: tuple[Annotated[int, Meta(ge=0)], Annotated[float, Meta(gt=0)]] | None = None
    grammar: Grammar | None = None

    guidance_scale: float = 1.0  # 1 is off
    negative_prompt_token_ids: list[TokenId] = []  # empty: the prompt's last token alone, as in transformers
    beams: BeamParams | None = None
    prompt_lookup_num_tokens: Annotated[int, Meta(ge=0, le=MAX_DRAFT_TOKENS)] = 0  # drafted tokens per step; 0 is off
    max_matching_ngram_size: Annotated[int, Meta(ge=1, le=8)] = 2  # each size costs an entry for every token

    num_top_logprobs: Annotated[int, Meta(ge=0)] = 0  # alternatives with each token
    prompt_logprobs: bool = False  # also of the prompt's tokens but the first


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


class ModelVersion(Struct, frozen=True):
    """What answers depend on beside the request, as two digests; `model.version` makes them.

    `text` covers what an ingress needs to know of the model: what token ids, heads and limits mean. `numbers` covers
    what changes logits: weights and dtype. Tokens of different `numbers` never go into one answer.
    """

    text: str
    numbers: str


class EngineRequest(Struct, frozen=True, kw_only=True):
    """A validated, tokenized request.

    `output_token_ids` are tokens that an earlier attempt already produced: the engine goes on after them. That is
    how a request moves to another pipeline (replay). `sampling` is set exactly when the task is GENERATE,
    `continuation_token_ids` exactly when it is SCORE. `head` matters to CLASSIFY and QA, `pooling` to CLASSIFY
    (where ALL is not allowed) and EMBED, `num_top_logprobs` to SCORE.

    `is_admitted` says that a pipeline took it before, or another sequence of the same answer: it is not refused for
    want of room. It is not begun later than `time_left_s` after its arrival. A pipeline of another `text_version` or
    `numbers_version` (of `ModelVersion`; empty: any) does not take it.

    A smaller `priority` is served sooner: one step of it counts as much as arriving `PRIORITY_STEP` requests earlier,
    so nothing waits for ever. Requests share computed blocks of a common prefix exactly if their `cache_salt` is equal.
    Those of one `session_id` (empty: of none) go to the same pipeline, if they can; it is for who chooses a pipeline.
    """

    request_id: str
    task: Task
    prompt_token_ids: Annotated[list[TokenId], Meta(min_length=1)]
    output_token_ids: list[TokenId] = []
    sampling: SamplingParams | None = None
    head: str = DEFAULT_HEAD
    pooling: Pooling = Pooling.LAST
    continuation_token_ids: list[TokenId] = []  # follow the prompt; each one's log-probability is the answer
    num_top_logprobs: Annotated[int, Meta(ge=0)] = 0
    priority: Annotated[int, Meta(ge=-MAX_PRIORITY, le=MAX_PRIORITY)] = 0
    is_admitted: bool = False
    time_left_s: float | None = None
    cache_salt: str = ""
    session_id: str = ""
    text_version: str = ""
    numbers_version: str = ""
    traceparent: str = ""  # of the span that the request belongs to (W3C Trace Context); empty: it is not traced

    @property
    def num_prompt_tokens(self) -> int:
        """All that is given: of a SCORE the continuation too."""
        return len(self.prompt_token_ids) + len(self.continuation_token_ids)


class Refusal(Struct, frozen=True, tag="refusal"):
    """`InvalidRequestError` on its way back: a pipeline can't take the request."""

    field: str
    value: Any
    reason: str


class Overload(Struct, frozen=True, tag="overload"):
    """`OverloadedError` on its way back: the pipeline has no room for the request now.

    `queue_wait_s` as in `LoadEvent`, whatever the priority of this one.
    """

    message: str
    retry_after_s: float
    replica_id: str
    queue_wait_s: Annotated[float, Meta(ge=0)]


class OtherVersion(Struct, frozen=True, tag="other_version"):
    """A pipeline with another version of the model than the request asks for does not take it."""

    replica_id: str
    version: ModelVersion


class FinishReason(StrEnum):
    EOS = "eos"
    STOP = "stop"
    LENGTH = "length"
    TIME = "time"  # max_time_s is over


TokenLogprob = tuple[TokenId, float]


class TokenEvent(Struct, frozen=True, array_like=True, tag="token"):
    """One generated token. `index` counts output tokens from 0; the event with a `finish_reason` is the last.

    Log-probabilities are the model's own, before any processor. `top_logprobs` holds the likeliest
    `num_top_logprobs` tokens, best first, whether the chosen one is among them or not.
    """

    request_id: str
    index: int
    token_id: int
    logprob: float
    finish_reason: FinishReason | None = None
    top_logprobs: list[TokenLogprob] = []


class PromptEvent(Struct, frozen=True, array_like=True, tag="prompt"):
    """The log-probabilities of the prompt's tokens but the first, columns as in `HeadEvent`; before the first token."""

    request_id: str
    scores: Matrix


class HeadEvent(Struct, frozen=True, array_like=True, tag="head"):
    """The only event of a request that doesn't generate.

    `values` are the logits of CLASSIFY [1, num_labels] or QA [num_tokens, 2], the hidden states of EMBED
    [1 or num_tokens, n_embd], or SCORE's log-probabilities [num_continuation_tokens, 1 + 2 * num_top_logprobs]:
    the token's own, the ids of the likeliest tokens, and their log-probabilities.
    """

    request_id: str
    values: Matrix


class Beam(Struct, frozen=True, array_like=True):
    """A finished hypothesis. `score` is the sum of its processed log-probabilities over length ** length_penalty."""

    token_ids: list[TokenId]
    score: float
    finish_reason: FinishReason


class BeamEvent(Struct, frozen=True, array_like=True, tag="beams"):
    """The only event of a beam search: its `num_return_sequences` best hypotheses, best first."""

    request_id: str
    beams: list[Beam]


class FailureEvent(Struct, frozen=True, array_like=True, tag="failure"):
    """The request ended without an answer; always the last event."""

    request_id: str
    message: str
    is_request_at_fault: bool = False  # its own constraints left nothing to go on with
    is_pipeline_at_fault: bool = False  # it may be; another pipeline would show
    retry_after_s: float | None = None  # if the service was too full to begin it


Event = TokenEvent | PromptEvent | HeadEvent | BeamEvent | FailureEvent


class LoadEvent(Struct, frozen=True, array_like=True, tag="load"):
    """Of no request. The pipeline is ready, or it has lost a stage and is bringing it back; and how long a request of
    priority 0 that came now would wait. The first one on a stream also has the pipeline's version, and the size of its
    KV pool, which it may have found out itself. `num_others` counts the requests there, running or waiting, that came
    from other ingresses than the one that is told. `num_waiting` are all that wait for their turn; `waiting` the ids of
    those that the told ingress sent and that have had none yet, the last in the queue last."""

    is_ready: bool
    queue_wait_s: Annotated[float, Meta(ge=0)] = 0.0
    version: ModelVersion | None = None
    num_others: Annotated[int, Meta(ge=0)] = 0
    num_waiting: Annotated[int, Meta(ge=0)] = 0
    waiting: tuple[str, ...] = ()
    num_kv_blocks: Annotated[int, Meta(ge=0)] = 0  # 0: not told


def is_terminal(event: Event) -> bool:
    """Each request ends in exactly one event for which this holds."""
    if isinstance(event, TokenEvent):
        return event.finish_reason is not None
    return not isinstance(event, PromptEvent)


def num_generated(event: Event) -> int:
    """How many generated tokens an event brings; of a beam search those of the hypotheses returned."""
    if isinstance(event, TokenEvent):
        return 1
    return sum(len(beam.token_ids) for beam in event.beams) if isinstance(event, BeamEvent) else 0


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
    queue_wait_s: float  # expected, for a request of priority 0 that came now
    num_preemptions: int
    num_prefix_tokens: int  # of admitted sequences, those that another's blocks might have held
    num_prefix_tokens_reused: int  # of these, those that did
    num_tokens_drafted: int
    num_draft_tokens_accepted: int
    num_rows_ahead: int  # scheduled before their token was known
    num_rows_ahead_wasted: int  # of these, those whose request had ended by then
    num_prompt_tokens: int  # of all requests so far, those of replays and of cached prefixes too
    num_tokens_generated: int
    num_requests_finished: int
    num_requests_aborted: int
    num_requests_failed: int
    num_requests_not_finite: int  # of these, those whose numbers were NaN or infinite
    num_recoveries: int

    def as_dict(self) -> dict[str, Any]:
        return {field: getattr(self, field) for field in self.__struct_fields__}
