"""What langchain-openai's classes answer: `langchain_calls.py URL`."""

import asyncio
import json
import sys

import openai
from langchain_core.prompts import PromptTemplate
from langchain_openai import ChatOpenAI, OpenAI, OpenAIEmbeddings

PROMPTS = ["The President said", "It is a truth", "The Martians"]


MESSAGES = [("system", "Speak."), ("user", "Who are you?")]


async def asynchronous(llm: OpenAI, chat: ChatOpenAI, embeddings: OpenAIEmbeddings) -> dict[str, object]:
    return {
        "ainvoke": await llm.ainvoke(PROMPTS[0]),
        "abatch": await llm.abatch(PROMPTS),
        "astream": [piece async for piece in llm.astream(PROMPTS[0])],
        "achat": (await chat.ainvoke(MESSAGES)).content,
        "aembed": await embeddings.aembed_query(PROMPTS[0]),
    }


def main() -> None:
    settings = {"model": "gptj-demo", "base_url": f"{sys.argv[1]}/v1", "api_key": "none", "max_tokens": 12}
    llm = OpenAI(**settings, temperature=0)
    chat = ChatOpenAI(**settings, temperature=0)
    # Else it would send token ids of OpenAI's tokenizers, which mean other texts here.
    embeddings = OpenAIEmbeddings(
        model="gptj-demo", base_url=settings["base_url"], api_key="none", check_embedding_ctx_length=False
    )
    refused = None
    try:
        OpenAI(**settings, temperature=-1).invoke(PROMPTS[0])
    except openai.BadRequestError as error:
        refused = error.param
    scored = OpenAI(**settings, temperature=0, logprobs=2).generate([PROMPTS[0]])
    seeded = OpenAI(**settings, temperature=0.9, seed=7, n=2, best_of=3).generate([PROMPTS[0]])
    answers = {
        "invoke": llm.invoke(PROMPTS[0]),
        "stopped": llm.invoke(PROMPTS[0], stop=["the"]),
        "seeded": [generation.text for generation in seeded.generations[0]],
        "batch": llm.batch(PROMPTS),
        "stream": list(llm.stream(PROMPTS[0])),
        "chain": (PromptTemplate.from_template("The {who} said") | llm).invoke({"who": "President"}),
        "logprobs": scored.generations[0][0].generation_info["logprobs"],
        "usage": scored.llm_output["token_usage"],
        "refused": refused,
        "chat": chat.invoke(MESSAGES).content,
        "streamed_chat": [chunk.content for chunk in chat.stream(MESSAGES)],
        "chat_usage": chat.invoke(MESSAGES).usage_metadata,
        "embed": embeddings.embed_documents(PROMPTS),
        **asyncio.run(asynchronous(llm, chat, embeddings)),
    }
    print(json.dumps(answers))


main()
