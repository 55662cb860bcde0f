"""What the engine asks of the stages in one step, and what the last of them answers.

Frozen `msgspec` structs as in `types`: the in-process API and, as msgpack, the wire format between engine and stages.
"""

from enum import StrEnum
from typing import Annotated

from msgspec import Meta, Struct

from gptj_serve.types import DEFAULT_HEAD, Matrix, Seed, TokenId, TokenLogprob, Warpers

Position = Annotated[int, Meta(ge=0, lt=2**31)]
BlockId = Annotated[int, Meta(ge=0, lt=2**31)]

PLACEHOLDER_TOKEN_ID = 0
"""Stands where a row has no token yet."""

MAX_FRAME_BYTES = 1 << 30
"""No frame on any link is larger; a ZeroMQ peer that sends one is cut off."""


class RowOutput(StrEnum):
    """What the last stage's heads compute for one row of a microbatch."""

    NOTHING = "nothing"
    CLASSIFY = "classify"
    CLASSIFY_SUM = "classify_sum"  # the sum of all tokens' logits: the head is linear, so they add up to a mean's
    QA = "qa"
    HIDDEN_LAST = "hidden_last"  # the last token's hidden state
    HIDDEN_SUM = "hidden_sum"  # the sum over the row's tokens: chunks add up to a mean
    HIDDEN_ALL = "hidden_all"


class LogitEdits(Struct, frozen=True, array_like=True):
    """What one token's logits go through before the warpers, in this order; the engine works it out for each token.

    The order is transformers': `SequenceBias`, `RepetitionPenalty` (then OpenAI's two penalties, which transformers
    lacks), all that forbids tokens, `ForcedBOSToken` / `ForcedEOSToken`, `ExponentialDecayLengthPenalty`.
    Token ids beyond the logits are left out.
    """

    biases: list[tuple[TokenId, float]] = []  # added; at most one for each token
    repetition_penalty: float = 1.0  # positive logits are divided by it, negative ones multiplied
    seen_token_ids: list[TokenId] = []  # distinct ones of prompt and output: those that it applies to
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    output_counts: list[tuple[TokenId, int]] = []  # how often each token is in the output: for the two above
    banned_token_ids: list[TokenId] = []
    allowed_mask: bytes = b""  # if any: bit i % 8 of byte i // 8 is set if token i is allowed; beyond its end none is
    forced_token_ids: list[TokenId] = []  # if any: each has the score 0, and no other token is possible
    boosted_token_ids: list[TokenId] = []  # finite scores of these grow by |score| * boost
    boost: float = 0.0


class SampleSpec(Struct, frozen=True, array_like=True):
    """How the token after one of a row's last tokens is chosen.

    With a `guidance_scale` other than 1 the row has a single sample, and the next row of the microbatch, whose last
    token's logits are the unconditional ones, asks for nothing itself. Scores are then
    log p_uncond + guidance_scale * (log p - log p_uncond), before the edits.

    With `num_candidates` no token is chosen: the best so many after the edits, applied to log-probabilities, are
    returned with them. That is a step of beam search, and warpers have no part in it.
    """

    warpers: Warpers = Warpers()
    seed: Seed = 0
    edits: LogitEdits | None = None
    num_top_logprobs: Annotated[int, Meta(ge=0)] = 0
    guidance_scale: float = 1.0
    num_candidates: Annotated[int, Meta(ge=0)] = 0


class Row(Struct, frozen=True, array_like=True):
    """One sequence's share of a microbatch: `token_ids` at positions [start, start + len(token_ids)).

    `samples` ask for the tokens after the row's last len(samples) tokens: one for a sequence that goes on, more when
    the last tokens are a draft, which the engine then compares with what was chosen. `target_token_ids` ask for
    log-probabilities: of the first one after the row's token `first_target`, and so on.

    A row with `fed_from` was made ahead: its only token is the one that the first sample of that row of the microbatch
    before chooses, and `token_ids` holds a placeholder. If that row fails, what comes of this one means nothing.
    """

    token_ids: Annotated[list[TokenId], Meta(min_length=1)]
    start: Position
    block_table: list[BlockId]  # covers positions [0, start + len(token_ids))
    output: RowOutput = RowOutput.NOTHING
    samples: list[SampleSpec] = []
    head: str = DEFAULT_HEAD  # of CLASSIFY and QA
    target_token_ids: list[TokenId] = []
    first_target: Annotated[int, Meta(ge=0)] = 0
    num_top_targets: Annotated[int, Meta(ge=0)] = 0
    fed_from: Annotated[int, Meta(ge=0)] | None = None

    @property
    def end(self) -> int:
        return self.start + len(self.token_ids)


class MicroBatch(Struct, frozen=True, array_like=True):
    """All that a stage needs for one step, packed row after row. Stages run ids in order, without gaps.

    `block_copies` (from, to) are made first. Then each layer writes the keys and values of all rows before any row
    attends, so a row may read blocks that another row of the same microbatch fills.
    """

    microbatch_id: Annotated[int, Meta(ge=0)]
    rows: Annotated[list[Row], Meta(min_length=1)]
    block_copies: list[tuple[BlockId, BlockId]] = []
    traceparents: list[str] = []  # of the spans (W3C Trace Context) of those of its sequences that are traced

    @property
    def num_tokens(self) -> int:
        return sum(len(row.token_ids) for row in self.rows)


class SampledToken(Struct, frozen=True, array_like=True):
    """A chosen token; log-probabilities are those of the raw logits."""

    token_id: TokenId
    logprob: float
    top_logprobs: list[TokenLogprob] = []


class RowResult(Struct, frozen=True, array_like=True):
    """What came of one row. With a `failure`, this row alone went wrong and there is nothing else.

    `is_kv_suspect`: it was the model's own numbers that went wrong, so nobody should build on the row's KV.
    """

    tokens: list[SampledToken] = []  # one for each of the row's samples
    candidates: list[TokenLogprob] = []  # of a sample with num_candidates, best first, finite ones only
    values: Matrix | None = None  # of the row's output
    targets: Matrix | None = None  # [len(target_token_ids), 1 + 2 * num_top_targets]; columns as in `HeadEvent`
    failure: str | None = None
    is_kv_suspect: bool = False


class StepOutput(Struct, frozen=True, array_like=True):
    """What came of a microbatch: one entry per row, in the rows' order; None where nothing was asked for."""

    microbatch_id: int
    rows: list[RowResult | None]
