"""`Answers`: each answer of an ingress is made by one version of the model, though two may run side by side.

An answer is all that one HTTP request or call gets; its sequences may run on several pipelines. The first event of any
of them decides of which version's numbers the whole answer is. Until then they may go to any pipeline that understands
token ids and heads as this ingress does.
"""

import asyncio
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from gptj_serve.errors import OverloadedError
from gptj_serve.serving.replicas import Replicas
from gptj_serve.types import ModelVersion

RETRY_AFTER_S = 1.0

ARRIVAL_TIMEOUT_S = 10.0
"""Serve tells an ingress of new pipelines within a second or two."""

POLL_PERIOD_S = 0.05


@dataclass(slots=True)
class Answer:
    numbers_version: str = ""  # empty until its first event
    num_sequences: int = 0  # that are open


class Answers:
    def __init__(self, text_version: str, replicas: Replicas) -> None:
        """`text_version` is this ingress's own; empty: it goes with any pipeline."""
        self.text_version = text_version
        self._replicas = replicas
        self._open: dict[str, Answer] = {}  # by what the ids of their sequences begin with

    @contextmanager
    def sequence(self, sequence_id: str) -> Iterator[Answer]:
        """The answer that a sequence (`<the answer's>-<its own>`) is part of."""
        name = sequence_id.rsplit("-", 1)[0]
        answer = self._open.setdefault(name, Answer())
        answer.num_sequences += 1
        try:
            yield answer
        finally:
            answer.num_sequences -= 1
            if answer.num_sequences == 0:
                del self._open[name]

    def takes(self, answer: Answer, replica_id: str) -> bool:
        """Whether an event of this replica may go into the answer; the first one decides."""
        version = self._replicas.version(replica_id)
        if version is None:
            return True
        answer.numbers_version = answer.numbers_version or version.numbers
        return answer.numbers_version == version.numbers

    def unfit(self, answer: Answer) -> frozenset[str]:
        """Ids of running replicas that can't go on with it."""
        return frozenset(replica_id for replica_id in self._replicas.running if not self._fits(answer, replica_id))

    async def wait_for_one_that_fits(self, answer: Answer) -> None:
        """Raises `OverloadedError` if there is none: at once where the answer has begun.

        A new ingress may be asked a moment before it hears of the pipelines that came with it.
        """
        deadline = time.monotonic() + ARRIVAL_TIMEOUT_S
        while True:
            try:
                return self.check_not_stranded(answer)
            except OverloadedError:
                if answer.numbers_version or time.monotonic() >= deadline:
                    raise
            await asyncio.sleep(POLL_PERIOD_S)

    def check_not_stranded(self, answer: Answer) -> None:
        """Raises `OverloadedError` if no running replica can go on with it."""
        running = self._replicas.running
        if running and not any(self._fits(answer, replica_id) for replica_id in running):
            raise OverloadedError(
                "the model was replaced by another version before the request was answered; send it again",
                RETRY_AFTER_S,
            )

    def others(self, answer: Answer, replica_id: str) -> frozenset[str]:
        """Replicas that are ready and known to give what this one would: its sequences may move there."""
        version = self._replicas.version(replica_id)
        others = self._replicas.others(replica_id)
        if version is None:
            return others
        bound = Answer(answer.numbers_version or version.numbers)
        return frozenset(
            other for other in others if self._replicas.version(other) is not None and self._fits(bound, other)
        )

    def _fits(self, answer: Answer, replica_id: str) -> bool:
        version: ModelVersion | None = self._replicas.version(replica_id)
        if version is None or not self.text_version:
            return True
        return version.text == self.text_version and answer.numbers_version in ("", version.numbers)
