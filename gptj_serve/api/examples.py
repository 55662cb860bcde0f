"""Requests to try, which the OpenAPI schema shows: all of them are answered by the demo checkpoint.

Except for the chat, which needs a chat template.
"""

from fastapi.openapi.models import Example

Examples = dict[str, Example]

_MODEL = "gptj-demo"
_TEXT = "The President said"
_CONTEXT = "Anna lives in Paris. She works at the museum."
_REQUEST = "how much money is in my account"

COMPLETIONS: Examples = {
    "sampled": {
        "summary": "Drawn with a seed",
        "value": {"model": _MODEL, "prompt": _TEXT, "max_tokens": 20, "temperature": 0.8, "seed": 1},
    },
    "scored": {
        "summary": "The prompt's log-probabilities, and no new token",
        "value": {"model": _MODEL, "prompt": _TEXT, "max_tokens": 0, "echo": True, "logprobs": 2},
    },
    "streamed": {
        "summary": "Two choices, streamed, with the usage",
        "value": {
            "model": _MODEL,
            "prompt": _TEXT,
            "n": 2,
            "stream": True,
            "stream_options": {"include_usage": True},
        },
    },
    "guided": {
        "summary": "One of two texts",
        "value": {
            "model": _MODEL,
            "prompt": "Is the sky blue?",
            "structured_outputs": {"choice": [" yes", " no"]},
            "temperature": 0,
        },
    },
}
CHATS: Examples = {
    "question": {
        "summary": "A question; the deployment needs a chat template",
        "value": {
            "model": _MODEL,
            "messages": [{"role": "user", "content": "Where does the President live?"}],
            "max_completion_tokens": 20,
            "temperature": 0,
        },
    },
}
EMBEDDINGS: Examples = {
    "two texts": {
        "summary": "Two texts",
        "value": {"model": _MODEL, "input": ["how much money do I have", _REQUEST]},
    },
}
GENERATE_STREAM: Examples = {
    "greedy": {"summary": "Greedy", "value": {"inputs": _TEXT, "parameters": {"max_new_tokens": 20}}},
    "sampled": {
        "summary": "Drawn, with the tokens",
        "value": {"inputs": _TEXT, "parameters": {"temperature": 0.8, "seed": 1, "details": True}},
    },
}
GENERATE: Examples = GENERATE_STREAM | {
    "beams": {
        "summary": "Beam search",
        "value": {"inputs": _TEXT, "parameters": {"num_beams": 4, "no_repeat_ngram_size": 3}},
    },
}
CLASSIFY_WITH_HEAD: Examples = {
    "best": {"summary": "The three best labels", "value": {"inputs": _REQUEST, "parameters": {"top_k": 3}}},
}
CLASSIFY: Examples = CLASSIFY_WITH_HEAD | {
    "zero-shot": {
        "summary": "Labels of your own",
        "value": {"inputs": _REQUEST, "parameters": {"candidate_labels": ["banking", "travel"]}},
    },
}
QA: Examples = {
    "one": {
        "summary": "A question about a text",
        "value": {"inputs": {"question": "Where does Anna live?", "context": _CONTEXT}},
    },
    "two answers": {
        "summary": "The two best answers",
        "value": {"inputs": {"question": "Where does Anna live?", "context": _CONTEXT}, "parameters": {"top_k": 2}},
    },
}
EMBED: Examples = {"one": {"summary": "A text", "value": {"inputs": _REQUEST}}}
TOKENIZE: Examples = {
    "vLLM": {"summary": "vLLM's shape", "value": {"prompt": _TEXT, "return_token_strs": True}},
    "TGI": {"summary": "Text Generation Inference's shape", "value": {"inputs": _TEXT}},
}
DETOKENIZE: Examples = {"tokens": {"summary": "Three tokens", "value": {"tokens": [5, 6, 7]}}}
