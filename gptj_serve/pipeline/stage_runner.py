"""`StageRunner`: one stage at work: its layers, its KV cache, and on the last stage heads and sampler."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from gptj_serve.model.attention import AttentionPlan, KVCache, PagedAttention, PagedRow
from gptj_serve.model.checkpoint import Checkpoint
from gptj_serve.model.deterministic import make_deterministic
from gptj_serve.model.heads import HeadCheckpoint
from gptj_serve.model.loading_progress import Progress, silent
from gptj_serve.model.stage import GPTJStage, load_stage
from gptj_serve.pipeline.row_outputs import RowOutputs
from gptj_serve.steps import MicroBatch, StepOutput


@dataclass(frozen=True, slots=True)
class StageSpec:
    """What a stage needs to know to make itself ready."""

    span: range
    num_kv_blocks: int
    block_size: int
    dtype: torch.dtype
    device: torch.device
    num_token_ids: int  # the tokenizer's; logits beyond have no token and are never sampled
    deterministic: bool = False  # what comes of a row doesn't depend on the other rows, in any bit


class StageRunner:
    """Stateless but for weights and KV tensors: each microbatch brings all that a step needs.

    Microbatches must come in the order of their ids, without gaps, or an earlier one could overwrite the KV of a
    later one.
    """

    def __init__(self, stage: GPTJStage, spec: StageSpec, heads: dict[str, HeadCheckpoint] | None = None) -> None:
        self.stage = stage
        self.spec = spec
        self._attention_plan: AttentionPlan | None = None
        convert: Callable[[nn.Linear], nn.Module] | None = None
        if spec.deterministic:
            self._attention_plan, convert = make_deterministic(stage)
        self._cache = KVCache(
            stage.config, len(spec.span), spec.num_kv_blocks, spec.block_size, spec.dtype, spec.device
        )
        self._outputs = RowOutputs(stage, spec.num_token_ids, heads or {}, convert) if stage.is_last else None
        self._last_microbatch_id: int | None = None

    @classmethod
    def load(
        cls,
        checkpoint: Checkpoint,
        spec: StageSpec,
        heads: dict[str, HeadCheckpoint] | None = None,
        progress: Progress = silent,
    ) -> "StageRunner":
        """Load the span; the last stage also takes `heads`, by the names that rows call them."""
        return cls(load_stage(checkpoint, spec.span, spec.dtype, spec.device, progress), spec, heads)

    @property
    def weight_bytes(self) -> int:
        return sum(parameter.nbytes for parameter in self.stage.parameters())

    @property
    def kv_cache_bytes(self) -> int:
        return self._cache.num_bytes

    def synchronize(self) -> None:
        """Wait until the device has done what it was given."""
        if self.spec.device.type == "cuda":
            torch.cuda.synchronize(self.spec.device)

    def restart(self) -> None:
        """Forget the order so far: the engine recomputes every sequence after a stage was lost."""
        self._last_microbatch_id = None

    @torch.inference_mode()
    def run(self, microbatch: MicroBatch, hidden: Tensor | None) -> Tensor | StepOutput:
        """One step: hidden states [T, D] from the previous stage (None on the first) → those for the next, or,
        on the last stage, the step's output."""
        self._check_order(microbatch.microbatch_id)
        if microbatch.block_copies:
            self._cache.copy_blocks(microbatch.block_copies)
        rows = [PagedRow(row.start, len(row.token_ids), row.block_table) for row in microbatch.rows]
        attention = PagedAttention(rows, self._cache, self._attention_plan)
        if hidden is None:
            token_ids = [token_id for row in microbatch.rows for token_id in row.token_ids]
            hidden = torch.tensor(token_ids, device=self.spec.device)
        hidden = self.stage(hidden.to(self.spec.device), attention.positions, attention.layer)
        if self._outputs is None:
            return hidden
        return StepOutput(microbatch.microbatch_id, self._outputs.of(microbatch.rows, hidden))

    def _check_order(self, microbatch_id: int) -> None:
        expected = microbatch_id if self._last_microbatch_id is None else self._last_microbatch_id + 1
        assert microbatch_id == expected, f"microbatch {microbatch_id} came when {expected} was due"
        self._last_microbatch_id = microbatch_id
