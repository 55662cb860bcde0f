"""Request bodies in Hugging Face's shapes: `/generate` as Text Generation Inference, the rest as the pipelines."""

from typing import Annotated, Any, Literal

from pydantic import Field

from gptj_serve.api.sampling_schema import SamplingExtras
from gptj_serve.api.schema_types import (
    Body,
    Count,
    NonEmpty,
    NumSequences,
    NumTopLogprobs,
    PositiveCount,
    PositiveProbability,
    Seed,
    StopStrings,
    Temperature,
    off,
)


class TextGrammar(Body):
    """TGI's types, and two of our own: "choice", a list of strings, and "lark", in llguidance's dialect."""

    type: Literal["json", "json_object", "json_schema", "regex", "choice", "lark"]
    value: Any


class GenerateParameters(SamplingExtras):
    """Text Generation Inference's names, and transformers' for what it lacks.

    Sampling is on with `do_sample`, or as soon as a parameter is set that matters to nothing else.
    """

    max_new_tokens: Annotated[int, Field(ge=1)] = 20
    min_new_tokens: Count = 0
    do_sample: bool | None = None
    temperature: Temperature | None = None
    top_k: Count | None = None
    top_p: PositiveProbability | None = None
    seed: Seed | None = None
    best_of: NumSequences | None = None
    stop: StopStrings | None = None
    truncate: PositiveCount | None = None  # keep so many of the prompt's last tokens
    grammar: TextGrammar | None = None

    num_beams: NumSequences | None = None
    num_return_sequences: NumSequences | None = None

    return_full_text: bool | None = None
    details: bool = False
    top_n_tokens: NumTopLogprobs | None = None
    decoder_input_details: bool | None = None

    adapter_id: Annotated[str | None, off()] = None

    @property
    def effective_temperature(self) -> float:
        """0 is greedy. As in TGI, setting a sampling parameter asks for sampling."""
        if self.temperature is not None:
            return self.temperature
        knobs = (self.top_k, self.top_p, self.min_p, self.typical_p, self.epsilon_cutoff, self.eta_cutoff)
        return 1.0 if self.do_sample or any(knob is not None for knob in knobs) else 0.0


class GenerateRequest(Body):
    inputs: NonEmpty
    parameters: GenerateParameters = GenerateParameters()
    stream: bool = False


class ClassifyParameters(Body):
    """Those of transformers' text-classification pipeline; with `candidate_labels`, of its zero-shot pipeline."""

    top_k: Annotated[int, Field(ge=1)] | None = None
    function_to_apply: Literal["softmax", "sigmoid", "none"] | None = None
    candidate_labels: NonEmpty | Annotated[list[NonEmpty], Field(min_length=1)] | None = None
    hypothesis_template: NonEmpty | None = None
    multi_label: bool | None = None


class ClassifyRequest(Body):
    inputs: NonEmpty | Annotated[list[NonEmpty], Field(min_length=1)]
    model: NonEmpty | None = None  # the name of a head
    parameters: ClassifyParameters = ClassifyParameters()


class QAInputs(Body):
    question: NonEmpty
    context: NonEmpty


class QAParameters(Body):
    """Those of the question-answering pipeline of transformers 4; see `extractive_qa`."""

    top_k: Annotated[int, Field(ge=1, le=1000)] = 1
    doc_stride: Annotated[int, Field(ge=0)] | None = None
    max_seq_len: Annotated[int, Field(ge=2)] | None = None
    max_question_len: Annotated[int, Field(ge=1)] | None = None
    max_answer_len: Annotated[int, Field(ge=1)] = 15
    handle_impossible_answer: bool = False
    align_to_words: bool = True


class QARequest(Body):
    inputs: QAInputs | Annotated[list[QAInputs], Field(min_length=1)]
    model: NonEmpty | None = None  # the name of a head
    parameters: QAParameters = QAParameters()
