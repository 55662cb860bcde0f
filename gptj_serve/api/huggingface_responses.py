"""What the routes in Hugging Face's shapes answer."""

from typing import Literal, NotRequired

from typing_extensions import TypedDict

GenerateFinishReason = Literal["eos_token", "stop_sequence", "length"]


class Token(TypedDict):
    id: int
    text: str
    logprob: float | None  # None: of a beam search
    special: bool


class PrefillToken(TypedDict):
    id: int
    text: str
    logprob: float | None  # None: of the prompt's first token


class GenerateDetails(TypedDict):
    finish_reason: GenerateFinishReason
    generated_tokens: int
    seed: int | None  # None: nothing was drawn
    prefill: list[PrefillToken]  # empty unless asked for
    tokens: list[Token]
    top_tokens: NotRequired[list[list[Token]]]
    beam_score: NotRequired[float]


class BestOfSequence(GenerateDetails):
    generated_text: str


class GenerateDetailsOfBest(GenerateDetails):
    best_of_sequences: list[BestOfSequence]


class GenerateAnswer(TypedDict):
    generated_text: str
    details: NotRequired[GenerateDetailsOfBest | GenerateDetails]


class StreamDetails(TypedDict):
    finish_reason: GenerateFinishReason
    generated_tokens: int
    seed: int | None


class GenerateEvent(TypedDict):
    """An event of a streamed generation: a token; with the last one, the whole text and the details."""

    index: int
    token: Token
    generated_text: str | None
    details: StreamDetails | None
    top_tokens: NotRequired[list[Token]]


class LabelScore(TypedDict):
    label: str
    score: float


class ZeroShotLabels(TypedDict):
    """The labels, best first, and their scores: what transformers' zero-shot pipeline returns."""

    sequence: str
    labels: list[str]
    scores: list[float]


class QAAnswer(TypedDict):
    """`context[start:end] == answer`."""

    score: float
    start: int
    end: int
    answer: str


class TextToken(TypedDict):
    """A token of a text, with the half-open span of characters that it covers."""

    id: int
    text: str
    start: int
    stop: int


class Tokenized(TypedDict):
    count: int
    max_model_len: int
    tokens: list[int]
    token_strs: NotRequired[list[str] | None]


class Detokenized(TypedDict):
    prompt: str


class TokenizerInfo(TypedDict):
    """Of the special tokens the texts; None for those that the model has not got."""

    tokenizer_class: str
    bos_token: str | None
    eos_token: str | None
    pad_token: str | None
    model_max_length: int
    chat_template: str | None


GenerateAnswers = GenerateAnswer | list[GenerateAnswer]
ClassifyAnswers = list[list[LabelScore]] | list[LabelScore] | list[ZeroShotLabels]
QAAnswers = QAAnswer | list[QAAnswer] | list[list[QAAnswer]]


class HuggingFaceError(TypedDict):
    error: str
    error_type: str
