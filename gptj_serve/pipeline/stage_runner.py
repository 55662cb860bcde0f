"""`StageRunner`: one stage at work: its layers, its KV cache, and on the last stage heads and sampler."""

from dataclasses import dataclass

import torch
from torch import Tensor

from gptj_serve.engine.sampling import sample
from gptj_serve.model.attention import KVCache, PagedAttention, PagedRow
from gptj_serve.model.checkpoint import Checkpoint
from gptj_serve.model.stage import GPTJStage, load_stage
from gptj_serve.types import HeadLogits, MicroBatch, Row, RowFailure, RowOutput, RowResult, StepOutput


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

    def __init__(self, stage: GPTJStage, spec: StageSpec) -> None:
        self.stage = stage
        self.spec = spec
        self._cache = KVCache(
            stage.config, len(spec.span), spec.num_kv_blocks, spec.block_size, spec.dtype, spec.device
        )
        self._last_microbatch_id: int | None = None

    @classmethod
    def load(cls, checkpoint: Checkpoint, spec: StageSpec) -> "StageRunner":
        return cls(load_stage(checkpoint, spec.span, spec.dtype, spec.device), spec)

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
                    results[index] = _head_logits(self.stage.score(hidden[end - 1 : end]))
                case RowOutput.QA:
                    results[index] = _head_logits(self.stage.qa_outputs(hidden[first:end]))
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

    def _check_order(self, microbatch_id: int) -> None:
        expected = microbatch_id if self._last_microbatch_id is None else self._last_microbatch_id + 1
        assert microbatch_id == expected, f"microbatch {microbatch_id} came when {expected} was due"
        self._last_microbatch_id = microbatch_id


def _head_logits(logits: Tensor) -> HeadLogits | RowFailure:
    values: Tensor = logits.float()
    if not values.isfinite().all():
        return RowFailure("the model's logits hold NaN or infinity")
    return HeadLogits(values.tolist())
