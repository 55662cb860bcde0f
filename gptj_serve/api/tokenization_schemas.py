"""Request bodies of `/tokenize` and `/detokenize`."""

from pydantic import Field

from gptj_serve.api.chat_schemas import ChatPrompt, Messages
from gptj_serve.api.schema_types import Body, TokenId

_MODEL = "The served model's name; may be left out."
_ADD_SPECIAL_TOKENS = "The same either way: GPT-J's tokenizer adds none."


class TokenizeRequest(ChatPrompt):
    """One of `inputs` (Text Generation Inference's), `prompt` and `messages` (vLLM's)."""

    inputs: str | None = Field(None, description="A text, answered in Text Generation Inference's shape.")
    prompt: str | None = Field(None, description="A text, answered in vLLM's shape.")
    messages: Messages | None = Field(None, description="A chat, through the chat template, answered in vLLM's shape.")
    model: str | None = Field(None, description=_MODEL)
    add_special_tokens: bool | None = Field(None, description=_ADD_SPECIAL_TOKENS)
    return_token_strs: bool | None = Field(None, description="Also return the tokens as the vocabulary writes them.")


class DetokenizeRequest(Body):
    tokens: list[TokenId] = Field(description="Token ids.")
    model: str | None = Field(None, description=_MODEL)
