"""What litellm answers, by each of the two prefixes that fit: `litellm_calls.py URL`."""

import asyncio
import json
import sys

import litellm

PROMPT = "The President said"
MESSAGES = [{"role": "system", "content": "Speak."}, {"role": "user", "content": "Who are you?"}]
TEXTS = [PROMPT, "The fox"]

litellm.telemetry = False


def calls(prefix: str, chat_prefix: str, embedding_prefix: str, **at: str) -> dict[str, object]:
    def text_completion(**options: object) -> object:
        return litellm.text_completion(model=f"{prefix}/gptj-demo", prompt=PROMPT, max_tokens=12, **options, **at)

    def chat(**options: object) -> object:
        return litellm.completion(
            model=f"{chat_prefix}/gptj-demo", messages=MESSAGES, max_tokens=12, temperature=0, **options, **at
        )

    async def asynchronous() -> tuple[str, list[str]]:
        settings = {"model": f"{prefix}/gptj-demo", "prompt": PROMPT, "max_tokens": 12, "temperature": 0}
        whole = await litellm.atext_completion(**settings, **at)
        stream = await litellm.atext_completion(**settings, stream=True, **at)
        return whole.choices[0].text, [chunk.choices[0].text or "" async for chunk in stream]

    whole = text_completion(temperature=0, logprobs=2)
    embedded = litellm.embedding(model=f"{embedding_prefix}/gptj-demo", input=TEXTS, **at)
    refused = None
    try:
        text_completion(temperature=-1)
    except litellm.BadRequestError as error:
        refused = [error.status_code, str(error)]
    return {
        "text": whole.choices[0].text,
        "finish_reason": whole.choices[0].finish_reason,
        "usage": [whole.usage.prompt_tokens, whole.usage.completion_tokens],
        "token_logprobs": whole.choices[0].logprobs.token_logprobs,
        "sampled": text_completion(temperature=0.9, seed=7, top_p=0.95).choices[0].text,
        "stream": [chunk.choices[0].text or "" for chunk in text_completion(temperature=0, stream=True)],
        "async": asyncio.run(asynchronous()),
        "chat": chat().choices[0].message.content,
        "streamed_chat": [chunk.choices[0].delta.content or "" for chunk in chat(stream=True)],
        "embeddings": [entry["embedding"] for entry in embedded.data],
        "refused": refused,
    }


def main() -> None:
    at = {"api_base": f"{sys.argv[1]}/v1", "api_key": "none"}
    answers = {
        "OpenAI": calls("text-completion-openai", "openai", "openai", **at),
        "vLLM": calls("hosted_vllm", "hosted_vllm", "hosted_vllm", **at),
    }
    print(json.dumps(answers))


main()
