"""Request bodies, as people send them: Hugging Face's shape for the three tasks, OpenAI's for completions.

Unknown fields are refused, and so is every known one that is not supported, unless it has the value that means "off":
nothing is silently ignored. Limits that depend on the model or the configuration are checked in `service`.
"""

from typing import Annotated, Any, Literal, Self

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, StringConstraints, model_validator

DEFAULT_MAX_TOKENS = 16  # OpenAI's
MAX_STOP_STRINGS = 16
MAX_STOP_STRING_CHARACTERS = 256

NonEmpty = Annotated[str, StringConstraints(min_length=1)]
StopString = Annotated[str, StringConstraints(min_length=1, max_length=MAX_STOP_STRING_CHARACTERS)]
StopStrings = Annotated[list[StopString], Field(max_length=MAX_STOP_STRINGS)]
TokenIds = Annotated[list[Annotated[int, Field(ge=0, strict=True)]], Field(min_length=1)]
TokenIdLists = Annotated[list[TokenIds], Field(min_length=1)]
Seed = Annotated[int, Field(ge=0, lt=2**63)]
Count = Annotated[int, Field(ge=0, lt=2**31)]


def _off(*off_values: Any) -> AfterValidator:
    """Accept a parameter only with a value that asks for nothing."""

    def check(value: Any) -> Any:
        if value is not None and value not in off_values:
            raise ValueError("is not supported")
        return value

    return AfterValidator(check)


class _Body(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class GenerateParameters(_Body):
    """Text Generation Inference's names. Sampling is on with `do_sample`, or as soon as one of its knobs is set."""

    max_new_tokens: Annotated[int, Field(ge=1)] = 20
    min_new_tokens: Count = 0
    do_sample: bool | None = None
    temperature: Annotated[float, Field(ge=0, allow_inf_nan=False)] | None = None
    top_k: Count | None = None
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    seed: Seed | None = None
    stop: StopStrings = []
    stop_token_ids: Annotated[list[Annotated[int, Field(ge=0)]], Field(max_length=256)] = []
    return_full_text: bool | None = None
    details: bool = False

    adapter_id: Annotated[str | None, _off()] = None
    best_of: Annotated[int | None, _off(1)] = None
    decoder_input_details: Annotated[bool | None, _off(False)] = None
    frequency_penalty: Annotated[float | None, _off(0)] = None
    grammar: Annotated[dict[str, Any] | None, _off()] = None
    repetition_penalty: Annotated[float | None, _off(1)] = None
    top_n_tokens: Annotated[int | None, _off(0)] = None
    truncate: Annotated[int | None, _off()] = None
    typical_p: Annotated[float | None, _off(1)] = None
    watermark: Annotated[bool | None, _off(False)] = None

    @property
    def effective_temperature(self) -> float:
        """0 is greedy. As in TGI, setting a sampling knob asks for sampling."""
        if self.temperature is not None:
            return self.temperature
        asks_for_sampling = self.do_sample or self.top_k is not None or self.top_p is not None
        return 1.0 if asks_for_sampling else 0.0


class GenerateRequest(_Body):
    inputs: NonEmpty
    parameters: GenerateParameters = GenerateParameters()
    stream: bool = False


class ClassifyParameters(_Body):
    """Those of transformers' text-classification pipeline; with `candidate_labels`, of its zero-shot pipeline."""

    top_k: Annotated[int, Field(ge=1)] | None = None
    function_to_apply: Literal["softmax", "sigmoid", "none"] | None = None
    candidate_labels: NonEmpty | Annotated[list[NonEmpty], Field(min_length=1)] | None = None
    hypothesis_template: NonEmpty | None = None
    multi_label: bool | None = None


class ClassifyRequest(_Body):
    inputs: NonEmpty | Annotated[list[NonEmpty], Field(min_length=1)]
    model: NonEmpty | None = None  # the name of a head
    parameters: ClassifyParameters = ClassifyParameters()


class QAInputs(_Body):
    question: NonEmpty
    context: NonEmpty


class QAParameters(_Body):
    """Those of the question-answering pipeline of transformers 4; see `extractive_qa`."""

    top_k: Annotated[int, Field(ge=1, le=1000)] = 1
    doc_stride: Annotated[int, Field(ge=0)] | None = None
    max_seq_len: Annotated[int, Field(ge=2)] | None = None
    max_question_len: Annotated[int, Field(ge=1)] | None = None
    max_answer_len: Annotated[int, Field(ge=1)] = 15
    handle_impossible_answer: bool = False
    align_to_words: bool = True


class QARequest(_Body):
    inputs: QAInputs | Annotated[list[QAInputs], Field(min_length=1)]
    model: NonEmpty | None = None  # the name of a head
    parameters: QAParameters = QAParameters()


class StreamOptions(_Body):
    include_usage: bool = False


class CompletionRequest(_Body):
    """OpenAI's `/v1/completions`, with vLLM's names for what OpenAI lacks."""

    model: str
    prompt: NonEmpty | Annotated[list[NonEmpty], Field(min_length=1)] | TokenIds | TokenIdLists
    max_tokens: Annotated[int, Field(ge=1)] | None = DEFAULT_MAX_TOKENS
    temperature: Annotated[float, Field(ge=0, allow_inf_nan=False)] | None = 1.0
    top_p: Annotated[float, Field(gt=0, le=1)] | None = 1.0
    n: Annotated[int, Field(ge=1, le=16)] | None = 1
    seed: Seed | None = None
    stop: StopString | StopStrings | None = None
    stream: bool = False
    stream_options: StreamOptions | None = None
    user: str | None = None  # the caller's own label for its end user; it has no effect by definition

    top_k: Annotated[int, Field(ge=-1, lt=2**31)] = 0
    min_tokens: Count = 0
    stop_token_ids: Annotated[list[Annotated[int, Field(ge=0)]], Field(max_length=256)] = []
    ignore_eos: bool = False
    include_stop_str_in_output: bool = False
    return_token_ids: bool = False

    best_of: Annotated[int | None, _off(1)] = None
    echo: Annotated[bool | None, _off(False)] = None
    frequency_penalty: Annotated[float | None, _off(0)] = None
    logit_bias: Annotated[dict[str, float] | None, _off({})] = None
    logprobs: Annotated[int | None, _off()] = None
    presence_penalty: Annotated[float | None, _off(0)] = None
    suffix: Annotated[str | None, _off("")] = None

    @model_validator(mode="after")
    def _stream_options_need_stream(self) -> Self:
        if self.stream_options is not None and not self.stream:
            raise ValueError("stream_options is only allowed when stream is true")
        return self

    @property
    def prompts(self) -> list[str] | list[list[int]]:
        """The prompt as a list of prompts, whichever of its four shapes it came in."""
        if isinstance(self.prompt, str):
            return [self.prompt]
        if isinstance(self.prompt[0], int):
            return [self.prompt]
        return self.prompt

    @property
    def stop_strings(self) -> list[str]:
        return [self.stop] if isinstance(self.stop, str) else self.stop or []
