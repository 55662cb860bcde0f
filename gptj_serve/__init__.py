"""gptj_serve: GPT-J behind an API of your own, split over pipeline stages, run by Ray Serve.

The model classes can also be used by themselves, as those of Hugging Face transformers are:
`from gptj_serve import AutoTokenizer, GPTJForCausalLM`. They are imported when they are first asked for.
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from gptj_serve.model.config import GPTJConfig
    from gptj_serve.modeling.backbone import GPTJModel
    from gptj_serve.modeling.cache import DynamicCache
    from gptj_serve.modeling.generation_config import GenerationConfig
    from gptj_serve.modeling.heads import GPTJForCausalLM, GPTJForQuestionAnswering, GPTJForSequenceClassification
    from gptj_serve.modeling.tokenization import AutoTokenizer

__version__ = "0.1.0"

__all__ = [
    "AutoTokenizer",
    "DynamicCache",
    "GPTJConfig",
    "GPTJForCausalLM",
    "GPTJForQuestionAnswering",
    "GPTJForSequenceClassification",
    "GPTJModel",
    "GenerationConfig",
]

_MODULES = {
    "AutoTokenizer": "modeling.tokenization",
    "DynamicCache": "modeling.cache",
    "GPTJConfig": "model.config",
    "GPTJForCausalLM": "modeling.heads",
    "GPTJForQuestionAnswering": "modeling.heads",
    "GPTJForSequenceClassification": "modeling.heads",
    "GPTJModel": "modeling.backbone",
    "GenerationConfig": "modeling.generation_config",
}


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(f"{__name__}.{_MODULES[name]}"), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
