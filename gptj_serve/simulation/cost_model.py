"""`CostModel`: how long stages, handoffs and the engine take, by the shape of a microbatch; and the file it is kept in.

The time of a microbatch on a stage with L layers is

    stage_s + L * (weights_s + token_s * max(0, tokens - free_tokens)
                   + row_s * rows + context_s * context + pair_s * pairs)

and on the last stage also `head_s + sample_s * samples`. Tokens are those computed, over all rows. Context are those
whose KV is read for them, once a row; pairs are of a computed token and one that it attends to. `weights_s` is what it
takes to read a layer's weights: so many tokens as `free_tokens` are computed meanwhile, which makes it a roofline.
Between stages lies `handoff_s + handoff_token_s * tokens`. The engine, which does one thing at a time, takes
`engine_step_s + engine_row_s * rows` between a microbatch's end and the next one's start. `request_s` lies between a
client and the engine, and is part of the first token's time.
"""

from pathlib import Path
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, NonNegativeFloat, PositiveInt, ValidationError

from gptj_serve.errors import ConfigError
from gptj_serve.pipeline.partition import partition
from gptj_serve.simulation.step_shape import StepShape

Seconds = Annotated[float, Field(ge=0, allow_inf_nan=False)]


class _Part(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class ModelShape(_Part):
    """What the simulation needs to know of the model."""

    name: str
    num_layers: PositiveInt
    max_sequence_tokens: PositiveInt = Field(description="n_positions.")
    head_layers: NonNegativeFloat = Field(description="The LM head's cost in layers, by which layers are split.")


class CostModel(_Part):
    """Coefficients in seconds. `gptj-serve bench` makes one; so can you, from what you know of a machine."""

    source: Literal["measured", "estimated"] = Field(description="estimated: nothing of it was measured.")
    model: ModelShape
    stage_s: Seconds = Field(0.0, description="Each stage, each microbatch.")
    weights_s: Seconds = Field(0.0, description="A layer, each microbatch: reading its weights.")
    token_s: Seconds = Field(0.0, description="A layer, each token beyond free_tokens.")
    free_tokens: NonNegativeFloat = Field(0.0, description="Tokens that are computed while the weights are read.")
    row_s: Seconds = Field(0.0, description="A layer, each row: attention's own cost for a sequence.")
    context_s: Seconds = Field(0.0, description="A layer, each token of each row's context: reading its KV.")
    pair_s: Seconds = Field(0.0, description="A layer, each pair of a token and one that it attends to: arithmetic.")
    head_s: Seconds = Field(0.0, description="The last stage, each microbatch: the LM head's weights.")
    sample_s: Seconds = Field(0.0, description="The last stage, each sampled token.")
    handoff_s: Seconds = Field(0.0, description="From a stage to the next, each microbatch.")
    handoff_token_s: Seconds = Field(0.0, description="From a stage to the next, each token's hidden state.")
    engine_step_s: Seconds = Field(0.0, description="The engine, each microbatch.")
    engine_row_s: Seconds = Field(0.0, description="The engine, each row.")
    request_s: Seconds = Field(0.0, description="A request's way to the engine and its first token's way back.")
    notes: dict[str, str | int | float] = Field({}, description="Machine, versions, errors of the fit.")

    @classmethod
    def read(cls, file: Path) -> "CostModel":
        """Raises `ConfigError`, naming the file and the field."""
        try:
            return cls.model_validate_json(file.read_bytes())
        except OSError as error:
            raise ConfigError(f"{file}: can't be read: {error.strerror}") from None
        except ValidationError as error:
            first = error.errors()[0]
            field = ".".join(map(str, first["loc"]))
            raise ConfigError(f"{file}: {field}: {first['msg']}") from None

    def write(self, file: Path) -> None:
        file.write_text(self.model_dump_json(indent=2) + "\n", encoding="utf-8")

    def pipeline(self, num_stages: int) -> "PipelineCost":
        """Of the service's own split into so many stages. Raises `ConfigError` if there are too few layers."""
        spans = partition(self.model.num_layers, num_stages, self.model.head_layers)
        return PipelineCost(self, [len(span) for span in spans])


class PipelineCost:
    """The same for stages of given numbers of layers, in the order of the pipeline."""

    def __init__(self, cost: CostModel, num_layers: list[int]) -> None:
        self.num_stages = len(num_layers)
        self.engine_step_s, self.engine_row_s = cost.engine_step_s, cost.engine_row_s
        self.handoff_s, self.handoff_token_s = cost.handoff_s, cost.handoff_token_s
        self._free_tokens = cost.free_tokens
        # Of each stage: fixed, token beyond free_tokens, row, context, pair, sample
        self._stages = [
            (
                cost.stage_s + layers * cost.weights_s + cost.head_s * (index == self.num_stages - 1),
                layers * cost.token_s,
                layers * cost.row_s,
                layers * cost.context_s,
                layers * cost.pair_s,
                cost.sample_s * (index == self.num_stages - 1),
            )
            for index, layers in enumerate(num_layers)
        ]

    def stage_times_s(self, shape: StepShape) -> list[float]:
        num_rows, num_tokens, num_context, num_pairs, num_samples = shape
        beyond = num_tokens - self._free_tokens if num_tokens > self._free_tokens else 0.0
        return [
            fixed + token * beyond + row * num_rows + context * num_context + pair * num_pairs + sample * num_samples
            for fixed, token, row, context, pair, sample in self._stages
        ]

    def handoff_time_s(self, shape: StepShape) -> float:
        return self.handoff_s + self.handoff_token_s * shape.num_tokens

    def engine_time_s(self, shape: StepShape) -> float:
        return self.engine_step_s + self.engine_row_s * shape.num_rows
