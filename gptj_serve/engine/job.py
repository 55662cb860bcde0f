"""`Job`: what the scheduler knows of a request: sequences to compute, and whom to give the results to."""

from collections.abc import Sequence as Seq
from dataclasses import dataclass
from typing import Protocol

from gptj_serve.engine.backlog import Work
from gptj_serve.engine.kv_blocks import KVBlocks
from gptj_serve.engine.sequence import Sequence
from gptj_serve.steps import Row, RowResult, SampleSpec
from gptj_serve.types import EngineRequest, Event


@dataclass(frozen=True, slots=True)
class Ride:
    """A row of a job in a microbatch, with the state of its sequence when it got on."""

    sequence: Sequence
    row: Row
    num_evictions: int

    @property
    def has_kv(self) -> bool:
        """What the row computed is still its sequence's."""
        return self.sequence.num_evictions == self.num_evictions


class Job(Protocol):
    """One unfinished request.

    If a job has several sequences, the last token of each of them is computed in one microbatch with those of the
    others, in their order: they are beams, or a text and its guide, and the next step needs all of them.
    """

    request: EngineRequest
    sequences: list[Sequence]
    width: int  # the most sequences that it will have

    @property
    def spec_ahead(self) -> SampleSpec | None:
        """How the token after the next one is chosen; None if that depends on the next one, or there are several
        sequences."""

    @property
    def is_decoding(self) -> bool:
        """All but the last token of each sequence is handed to the stages, and what comes next is one more token."""

    @property
    def work_left(self) -> Work:
        """Over all sequences, at most."""

    def num_reusable(self, sequence: Sequence) -> int:
        """Of so many first tokens of the sequence nothing but the KV is wanted."""

    def draft(self, max_tokens: int) -> list[int]:
        """Tokens that might come next, to be verified along with the last one."""

    def row(self, sequence: Sequence, end: int, draft: list[int]) -> Row:
        """The row for the sequence's uncomputed tokens before `end`, then the draft."""

    def take(self, rides: Seq[Ride], results: Seq[RowResult], blocks: KVBlocks, now: float) -> list[Event]:
        """What the rows of one microbatch mean. They may be late: of KV that was given up, or of an earlier token."""
