"""`StageRunner`: one stage at work: its layers, its KV cache, and on the last stage heads and sampler."""

import ctypes
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor, nn

from gptj_serve.config import Kernels, Quantization
from gptj_serve.engine.sampling import Statistics
from gptj_serve.kernels.choice import choose_operand_type, chooses_gpu_kernels
from gptj_serve.kernels.cpu_layers import CPULayers, PackedBlock
from gptj_serve.kernels.row_statistics import row_statistics
from gptj_serve.kernels.weights import OperandType, PackedLinear
from gptj_serve.model.attention import PagedRow
from gptj_serve.model.block import GPTJBlock
from gptj_serve.model.checkpoint import Checkpoint
from gptj_serve.model.deterministic import make_deterministic
from gptj_serve.model.heads import HeadCheckpoint
from gptj_serve.model.loading_progress import Progress, silent
from gptj_serve.model.stage import GPTJStage, load_stage
from gptj_serve.pipeline.last_tokens import LastTokens
from gptj_serve.pipeline.layers import Layers, TorchLayers
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
    quantization: Quantization = "none"
    kernels: Kernels = "auto"
    max_num_sequences: int = 256  # in a microbatch; these two are what a GPU's graphs and buffers are made for
    max_microbatch_tokens: int = 512


class StageRunner:
    """Stateless but for weights, KV tensors and the last step's tokens: each microbatch brings all that a step needs.

    Microbatches must come in the order of their ids, without gaps, or an earlier one could overwrite the KV of a
    later one.
    """

    def __init__(
        self,
        stage: GPTJStage,
        spec: StageSpec,
        heads: dict[str, HeadCheckpoint] | None = None,
        layers: Layers | None = None,
    ) -> None:
        """`layers` run in place of the stage's own, and without a bit of a row depending on the others."""
        self.stage = stage
        self.spec = spec
        convert: Callable[[nn.Linear], nn.Module] | None = None
        statistics: Statistics | None = None
        if layers is not None:
            statistics = row_statistics
            convert = partial(PackedLinear, operand_type=OperandType.FLOAT32)
            self._layers = layers
        else:
            attention_plan = None
            if spec.deterministic:
                attention_plan, convert = make_deterministic(stage)
            self._layers = TorchLayers(
                stage, spec.num_kv_blocks, spec.block_size, spec.dtype, spec.device, attention_plan
            )
        self._outputs = None
        if stage.is_last:
            self._outputs = RowOutputs(stage, spec.num_token_ids, heads or {}, convert, statistics)
        self._last_tokens = LastTokens()
        self._last_microbatch_id: int | None = None

    @classmethod
    def load(
        cls,
        checkpoint: Checkpoint,
        spec: StageSpec,
        heads: dict[str, HeadCheckpoint] | None = None,
        progress: Progress = silent,
    ) -> "StageRunner":
        """Load the span; the last stage also takes `heads`, by the names that rows call them.

        On our own kernels where they can be used. Raises `ConfigError` if there are none for what is asked.
        """
        return cls.prepare(checkpoint, spec, heads, progress)(spec.num_kv_blocks)

    @classmethod
    def prepare(
        cls,
        checkpoint: Checkpoint,
        spec: StageSpec,
        heads: dict[str, HeadCheckpoint] | None = None,
        progress: Progress = silent,
    ) -> Callable[[int], "StageRunner"]:
        """`load` in two parts: first the weights. What comes back takes a number of KV blocks, in place of the spec's,
        and makes a runner with that pool: of several on the same weights one may be at work.
        """
        config = checkpoint.config
        if spec.device.type == "cuda":
            sum_in_fp32()
            if chooses_gpu_kernels(config, spec.dtype, spec.device, spec.quantization, spec.kernels):
                from gptj_serve.pipeline.gpu.cuda_device import CUDADevice  # these build on this module
                from gptj_serve.pipeline.gpu.loading import prepare_on_gpu

                return prepare_on_gpu(CUDADevice(spec.device), checkpoint, spec, heads, progress)
            stage = load_stage(checkpoint, spec.span, spec.dtype, spec.device, progress)
            return lambda num_kv_blocks: cls(stage, replace(spec, num_kv_blocks=num_kv_blocks), heads)
        operand_type = choose_operand_type(
            config, spec.dtype, spec.device, spec.block_size, spec.quantization, spec.kernels
        )
        if operand_type is None:
            stage = load_stage(checkpoint, spec.span, spec.dtype, spec.device, progress)
            return lambda num_kv_blocks: cls(stage, replace(spec, num_kv_blocks=num_kv_blocks), heads)
        blocks: list[PackedBlock] = []

        def pack(block: GPTJBlock) -> None:
            blocks.append(PackedBlock(block, operand_type))

        stage = load_stage(checkpoint, spec.span, spec.dtype, spec.device, progress, pack)
        if stage.is_last:
            _pack_heads(stage, operand_type)
        _give_back_freed_memory()

        def on_our_kernels(num_kv_blocks: int) -> StageRunner:
            layers = CPULayers(config, blocks, num_kv_blocks, spec.dtype)
            return cls(stage, replace(spec, num_kv_blocks=num_kv_blocks), heads, layers)

        return on_our_kernels

    @property
    def kernels(self) -> str:
        return self._layers.kernels

    @property
    def weight_bytes(self) -> int:
        packed = sum(module.num_bytes for module in self.stage.modules() if isinstance(module, PackedLinear))
        return sum(parameter.nbytes for parameter in self.stage.parameters()) + self._layers.weight_bytes + packed

    @property
    def kv_cache_bytes(self) -> int:
        return self._layers.kv_cache_bytes

    def synchronize(self) -> None:
        """Wait until the device has done what it was given; what it still hands on is not waited for."""
        if self.spec.device.type == "cuda":
            torch.cuda.current_stream(self.spec.device).synchronize()

    def restart(self) -> None:
        """Forget the order and the tokens so far: the engine recomputes every sequence after a stage was lost."""
        self._last_tokens.forget()
        self._last_microbatch_id = None

    @torch.inference_mode()
    def run(self, microbatch: MicroBatch, hidden: Tensor | None) -> Tensor | StepOutput:
        """One step: hidden states [T, D] from the previous stage (None on the first) → those for the next, or,
        on the last stage, the step's output."""
        self._check_order(microbatch.microbatch_id)
        if microbatch.block_copies:
            self._layers.copy_blocks(microbatch.block_copies)
        rows = [PagedRow(row.start, len(row.token_ids), row.block_table) for row in microbatch.rows]
        if hidden is None:
            token_ids = self._last_tokens.fill_in(microbatch.rows)
            hidden = self.stage.wte(torch.tensor(token_ids, device=self.spec.device))
        hidden = self._layers.forward(hidden.to(self.spec.device), rows)
        if self._outputs is None:
            return hidden
        results = self._outputs.of(microbatch.rows, self.stage.ln_f(hidden))
        self._last_tokens.keep(results)
        return StepOutput(microbatch.microbatch_id, results)

    def _check_order(self, microbatch_id: int) -> None:
        expected = microbatch_id if self._last_microbatch_id is None else self._last_microbatch_id + 1
        assert microbatch_id == expected, f"microbatch {microbatch_id} came when {expected} was due"
        self._last_microbatch_id = microbatch_id


def sum_in_fp32() -> None:
    """What is summed in products on GPUs, whatever the operands' dtype: for fp32 without TF32, for half precision also
    where a sum is made of parts, which by default may be rounded, and in float16 overflow. For the whole process."""
    torch.set_float32_matmul_precision("highest")
    torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction = False
    torch.backends.cuda.matmul.allow_fp16_reduced_precision_reduction = False


def _pack_heads(stage: GPTJStage, operand_type: OperandType) -> None:
    """The stage's own heads. Those of tasks are small: they lose nothing to speed."""
    stage.ln_f.float()
    for name, head_type in (
        ("lm_head", operand_type),
        ("score", OperandType.FLOAT32),
        ("qa_outputs", OperandType.FLOAT32),
    ):
        if hasattr(stage, name):
            setattr(stage, name, PackedLinear(getattr(stage, name), head_type))


def _give_back_freed_memory() -> None:
    """glibc keeps what packing has freed, up to some hundred MB; other C libraries have no such function."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)
