"""Request bodies in Hugging Face's shapes: `/generate` as Text Generation Inference, the rest as the pipelines."""

from typing import Annotated, Any, Literal

from pydantic import Field

from gptj_serve.api.sampling_schema import SamplingExtras
from gptj_serve.api.schema_types import (
    JSON,
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
    Texts,
    off,
)


class TextGrammar(Body):
    type: Literal["json", "json_object", "json_schema", "regex", "choice", "lark"] = Field(
        description="TGI's types, and two of our own: `choice`, a list of strings, and `lark`, in llguidance's dialect."
    )
    value: JSON = Field(description='The schema, `{"schema": …}` for json_schema, the expression, texts or grammar.')


class GenerateParameters(SamplingExtras):
    """Text Generation Inference's names, and transformers' for what it lacks.

    Sampling is on with `do_sample`, or as soon as a parameter is set that matters to nothing else.
    """

    max_new_tokens: Annotated[int, Field(ge=1)] = Field(20, description="At most so many new tokens.")
    min_new_tokens: Count = Field(0, description="No end token and no stop token before so many tokens.")
    do_sample: bool | None = Field(None, description="Draw at temperature 1, unless temperature says another.")
    temperature: Temperature | None = Field(None, description="0 is greedy, whatever the others say. Default: greedy.")
    top_k: Count | None = Field(None, description="Only so many of the likeliest tokens; 0 is off.")
    top_p: PositiveProbability | None = Field(
        None, description="Only the likeliest tokens that together have so much probability."
    )
    seed: Seed | None = Field(
        None, description="The same seed gives the same text, alone or among others. Default: a new one each time."
    )
    best_of: NumSequences | None = Field(
        None, description="Draw so many and return the one of the highest mean log-probability; the others in details."
    )
    stop: StopStrings | None = Field(None, description="Texts after which the generated one ends.")
    truncate: PositiveCount | None = Field(None, description="Keep so many of the prompt's last tokens.")
    grammar: TextGrammar | None = Field(None, description="What the text must match, from its beginning to its end.")

    num_beams: NumSequences | None = Field(None, description="Beam search with so many beams; 1 is off.")
    num_return_sequences: NumSequences | None = Field(
        None, description="Return a list of so many answers, as transformers' pipeline does; 1 is off."
    )

    return_full_text: bool | None = Field(
        None, description="Begin the text with the whole of `inputs`, also what truncate left out."
    )
    details: bool = Field(False, description="Also return the tokens, their log-probabilities, the reason of the end.")
    top_n_tokens: NumTopLogprobs | None = Field(None, description="In the details, so many of the likeliest tokens.")
    decoder_input_details: bool | None = Field(
        None, description="In the details, the prompt's tokens with their log-probabilities."
    )

    adapter_id: Annotated[str | None, off()] = Field(None, description="Not supported: refused unless null.")

    @property
    def asks_to_draw(self) -> tuple[str, Any]:
        """The parameter that asks for sampling, and its value."""
        if self.temperature:
            return "temperature", self.temperature
        knobs = ("top_k", "top_p", "min_p", "typical_p", "epsilon_cutoff", "eta_cutoff")
        asked = (
            [] if self.do_sample else [(name, value) for name in knobs if (value := getattr(self, name)) is not None]
        )
        return asked[0] if asked else ("do_sample", self.do_sample)

    @property
    def effective_temperature(self) -> float:
        """0 is greedy. As in TGI, setting a sampling parameter asks for sampling."""
        if self.temperature is not None:
            return self.temperature
        knobs = (self.top_k, self.top_p, self.min_p, self.typical_p, self.epsilon_cutoff, self.eta_cutoff)
        return 1.0 if self.do_sample or any(knob is not None for knob in knobs) else 0.0


class GenerateRequest(Body):
    inputs: NonEmpty = Field(description="The text to go on with.")
    parameters: GenerateParameters = Field(default_factory=GenerateParameters, description="How to generate.")
    stream: bool = Field(False, description="Answer with server-sent events, as the text comes.")


class ClassifyParameters(Body):
    """Those of transformers' text-classification pipeline; with `candidate_labels`, of its zero-shot pipeline."""

    top_k: Annotated[int, Field(ge=1)] | None = Field(None, description="Only so many labels. Default: all.")
    function_to_apply: Literal["softmax", "sigmoid", "none"] | None = Field(
        None,
        description="From logits to scores. Default: sigmoid for several independent labels or a single one, else "
        "softmax.",
    )
    candidate_labels: NonEmpty | Texts | None = Field(
        None, description="Zero-shot: choose among these labels; a list, or separated by commas. None twice."
    )
    hypothesis_template: NonEmpty | None = Field(
        None, description="Zero-shot: a sentence with one `{}` where the label goes. Default: `This example is {}.`"
    )
    multi_label: bool | None = Field(None, description="Zero-shot: each label by itself; any number may be true.")


_HEAD = "The name of a head; `default` is the checkpoint's own, which is also the default."


class ClassifyRequest(Body):
    inputs: NonEmpty | Texts = Field(description="A text or several.")
    model: NonEmpty | None = Field(None, description=_HEAD)
    parameters: ClassifyParameters = Field(default_factory=ClassifyParameters, description="How to classify.")


class QAInputs(Body):
    question: NonEmpty = Field(description="What is asked.")
    context: NonEmpty = Field(description="The text that the answer is a part of.")


class QAParameters(Body):
    """Those of the question-answering pipeline of transformers 4."""

    top_k: Annotated[int, Field(ge=1, le=1000)] = Field(
        1, description="So many answers, best first; a list of them if over 1."
    )
    doc_stride: Annotated[int, Field(ge=0)] | None = Field(
        None, description="So many tokens of the context that two windows share. Default: half a window, at most 128."
    )
    max_seq_len: Annotated[int, Field(ge=2)] | None = Field(
        None, description="Tokens of a window, with the question. Default: 384, at most the model's context."
    )
    max_question_len: Annotated[int, Field(ge=1)] | None = Field(
        None, description="Keep so many of the question's first tokens. Default: 64."
    )
    max_answer_len: Annotated[int, Field(ge=1)] = Field(15, description="Tokens of an answer at most.")
    handle_impossible_answer: bool = Field(False, description="The empty answer counts too.")
    align_to_words: bool = Field(True, description="Answers begin and end at words.")


class QARequest(Body):
    inputs: QAInputs | Annotated[list[QAInputs], Field(min_length=1)] = Field(
        description="A question with its context, or several."
    )
    model: NonEmpty | None = Field(None, description=_HEAD)
    parameters: QAParameters = Field(default_factory=QAParameters, description="How to look for answers.")
