"""`StageRunner`: one stage at work: its layers, its KV cache, and on the last stage heads and sampler."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from gptj_serve.engine.sampling import sample
from gptj_serve.model.attention import KVCache, PagedAttention, PagedRow
from gptj_serve.model.checkpoint import Checkpoint
from gptj_serve.model.heads import HeadCheckpoint, HeadKind
from gptj_serve.model.stage import GPTJStage, load_stage
from gptj_serve.types import (
    DEFAULT_HEAD,
    HeadValues,
    Matrix,
    MicroBatch,
    Row,
    RowFailure,
    RowOutput,
    RowResult,
    StepOutput,
)

MAX_SCORED_ROWS = 128
"""Rows of logits, each as wide as the vocabulary, that exist at once while a continuation is scored."""


@dataclass(frozen=True, slots=True)
class StageSpec:
    """What a stage needs to know to make itself ready."""

    span: range
    num_kv_blocks: int
    block_size: int
    dtype: torch.dtype
    device: torch.device
    num_token_ids: int  # the tokenizer's; logits beyond have no token and are never sampled


class StageRunner:
    """Stateless but for weights and KV tensors: each microbatch brings all that a step needs.

    Microbatches must come in the order of their ids, without gaps, or an earlier one could overwrite the KV of a
    later one.
    """

    def __init__(self, stage: GPTJStage, spec: StageSpec, heads: dict[str, HeadCheckpoint] | None = None) -> None:
        self.stage = stage
        self.spec = spec
        self._cache = KVCache(
            stage.config, len(spec.span), spec.num_kv_blocks, spec.block_size, spec.dtype, spec.device
        )
        self._last_microbatch_id: int | None = None
        self._heads: dict[tuple[RowOutput, str], nn.Linear] = {}
        if hasattr(stage, "score"):
            self._heads[RowOutput.CLASSIFY, DEFAULT_HEAD] = stage.score
        if hasattr(stage, "qa_outputs"):
            self._heads[RowOutput.QA, DEFAULT_HEAD] = stage.qa_outputs
        if stage.is_last:
            for name, head in (heads or {}).items():
                output = RowOutput.CLASSIFY if head.info.kind is HeadKind.CLASSIFIER else RowOutput.QA
                self._heads[output, name] = _linear(head, spec)

    @classmethod
    def load(
        cls, checkpoint: Checkpoint, spec: StageSpec, heads: dict[str, HeadCheckpoint] | None = None
    ) -> "StageRunner":
        """Load the span; the last stage also takes `heads`, by the names that rows call them."""
        return cls(load_stage(checkpoint, spec.span, spec.dtype, spec.device), spec, heads)

    @property
    def weight_bytes(self) -> int:
        return sum(parameter.nbytes for parameter in self.stage.parameters())

    @property
    def kv_cache_bytes(self) -> int:
        return self._cache.num_bytes

    def restart(self) -> None:
        """Forget the order so far: the engine recomputes every sequence after a stage was lost."""
        self._last_microbatch_id = None

    @torch.inference_mode()
    def run(self, microbatch: MicroBatch, hidden: Tensor | None) -> Tensor | StepOutput:
        """One step: hidden states [T, D] from the previous stage (None on the first) → those for the next, or,
        on the last stage, the step's output."""
        self._check_order(microbatch.microbatch_id)
        rows = [PagedRow(row.start, len(row.token_ids), row.block_table) for row in microbatch.rows]
        attention = PagedAttention(rows, self._cache)
        if hidden is None:
            token_ids = [token_id for row in microbatch.rows for token_id in row.token_ids]
            hidden = torch.tensor(token_ids, device=self.spec.device)
        hidden = self.stage(hidden.to(self.spec.device), attention.positions, attention.layer)
        return StepOutput(microbatch.microbatch_id, self._outputs(microbatch, hidden)) if self.stage.is_last else hidden

    def _outputs(self, microbatch: MicroBatch, hidden: Tensor) -> list[RowResult]:
        results: list[RowResult] = [None] * len(microbatch.rows)
        sampled: list[tuple[int, Row, int]] = []  # (row index, row, its last token's place in `hidden`)
        first = 0
        for index, row in enumerate(microbatch.rows):
            end = first + len(row.token_ids)
            match row.output:
                case RowOutput.SAMPLE:
                    sampled.append((index, row, end - 1))
                case RowOutput.CLASSIFY:
                    results[index] = _values(self._heads[row.output, row.head](hidden[end - 1 : end]))
                case RowOutput.CLASSIFY_SUM:
                    logits = self._heads[RowOutput.CLASSIFY, row.head](hidden[first:end])
                    results[index] = _values(logits.double().sum(dim=0, keepdim=True))
                case RowOutput.QA:
                    results[index] = _values(self._heads[row.output, row.head](hidden[first:end]))
                case RowOutput.HIDDEN_LAST:
                    results[index] = _values(hidden[end - 1 : end])
                case RowOutput.HIDDEN_SUM:
                    results[index] = _values(hidden[first:end].double().sum(dim=0, keepdim=True))
                case RowOutput.HIDDEN_ALL:
                    results[index] = _values(hidden[first:end])
                case RowOutput.LOGPROBS:
                    results[index] = self._logprobs(hidden[first:end], row.target_token_ids)
            first = end
        if sampled:
            logits = self.stage.lm_head(hidden[[last for _, _, last in sampled]])[:, : self.spec.num_token_ids]
            rows = [row for _, row, _ in sampled]
            chosen = sample(
                logits,
                [row.sampling for row in rows if row.sampling is not None],
                [row.end for row in rows],
                [row.suppressed_token_ids for row in rows],
            )
            for (index, _, _), result in zip(sampled, chosen, strict=True):
                results[index] = result
        return results

    def _logprobs(self, hidden: Tensor, targets: Sequence[int]) -> HeadValues | RowFailure:
        """Of each target, after each of the last tokens of `hidden` [T, D]; only those rows go through the LM head."""
        if max(targets) >= self.spec.num_token_ids:
            return RowFailure(f"token id {max(targets)} has no logit: the model's are below {self.spec.num_token_ids}")
        states = hidden[-len(targets) :]
        wanted = torch.tensor(targets, device=hidden.device)
        parts = []
        for first in range(0, len(targets), MAX_SCORED_ROWS):
            part = slice(first, first + MAX_SCORED_ROWS)
            logits = self.stage.lm_head(states[part])[:, : self.spec.num_token_ids].float()
            parts.append(logits.gather(-1, wanted[part, None]) - logits.logsumexp(dim=-1, keepdim=True))
        return _values(torch.cat(parts))

    def _check_order(self, microbatch_id: int) -> None:
        expected = microbatch_id if self._last_microbatch_id is None else self._last_microbatch_id + 1
        assert microbatch_id == expected, f"microbatch {microbatch_id} came when {expected} was due"
        self._last_microbatch_id = microbatch_id


def _values(values: Tensor) -> HeadValues | RowFailure:
    """[rows, columns] for the wire."""
    values = values.float()
    if not values.isfinite().all():
        return RowFailure("the model's logits hold NaN or infinity")
    return HeadValues(Matrix.of(values.cpu().numpy()))


def _linear(head: HeadCheckpoint, spec: StageSpec) -> nn.Linear:
    num_outputs, width = head.weight.shape
    linear = nn.Linear(width, num_outputs, bias=head.bias is not None, device=spec.device, dtype=spec.dtype)
    with torch.no_grad():
        linear.weight.copy_(torch.from_numpy(head.weight))
        if head.bias is not None:
            linear.bias.copy_(torch.from_numpy(head.bias))
    return linear.requires_grad_(False)
