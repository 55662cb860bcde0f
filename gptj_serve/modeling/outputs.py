"""What the models return: attributes, dictionary and tuple in one, as transformers' `ModelOutput`.

Fields that are None are absent from the dictionary and the tuple: `output[0]` is the loss if there is one. The cache
is also found under its former name. Shapes: `B` rows, `T` tokens, `D` n_embd, `H` heads, `C` keys (past and present),
`V` vocab_size.
"""

from collections import OrderedDict
from dataclasses import dataclass, fields
from typing import Any, TypeVar, dataclass_transform

from torch import Tensor
from torch.utils._pytree import Context, register_pytree_node

from gptj_serve.modeling.attention import Cache
from gptj_serve.modeling.former_name import FORMER_NAME, made_by_former_name, renamed


class ModelOutput(OrderedDict[str, Any]):
    """Base of the outputs, each a dataclass whose fields are its keys. Keys can be set, not removed."""

    def __init_subclass__(cls) -> None:
        # So that wrappers which walk over outputs, such as DistributedDataParallel, find the tensors in them.
        def flatten(output: Any) -> tuple[list[Any], Context]:
            return list(output.values()), list(output)

        def unflatten(values: Any, keys: Context) -> Any:
            return cls(**dict(zip(keys, values, strict=True)))

        register_pytree_node(cls, flatten, unflatten, serialized_type_name=f"{cls.__module__}.{cls.__name__}")

    def __post_init__(self) -> None:
        for name in self._field_names():
            if (value := getattr(self, name)) is not None:
                super().__setitem__(name, value)

    def __getitem__(self, key: Any) -> Any:
        return super().__getitem__(renamed(key)) if isinstance(key, str) else self.to_tuple()[key]

    def __contains__(self, key: Any) -> bool:
        return super().__contains__(renamed(key))

    def get(self, key: str, default: Any = None) -> Any:
        return super().get(renamed(key), default)

    def __setattr__(self, name: str, value: Any) -> None:
        name = renamed(name)
        if value is not None and name in self._field_names():
            super().__setitem__(name, value)
        super().__setattr__(name, value)

    @property
    def past_key_values(self) -> Any:
        return getattr(self, renamed(FORMER_NAME))

    def __setitem__(self, key: str, value: Any) -> None:
        key = renamed(key)
        super().__setitem__(key, value)
        super().__setattr__(key, value)

    def _refuse(self, *_: Any, **__: Any) -> Any:
        raise TypeError(f"the keys of a {type(self).__name__} are its fields: they can't be removed")

    __delitem__ = pop = popitem = setdefault = update = clear = _refuse

    def __reduce__(self) -> Any:
        return type(self), tuple(getattr(self, name) for name in self._field_names())

    def to_tuple(self) -> tuple[Any, ...]:
        """The values of all fields that are not None."""
        return tuple(self.values())

    def _field_names(self) -> list[str]:
        return [field.name for field in fields(self)]  # type: ignore[arg-type]  # subclasses are dataclasses


T = TypeVar("T", bound=ModelOutput)


@dataclass_transform()
def model_output(cls: type[T]) -> type[T]:
    """Make it a dataclass, which may be given its `cache` by the former name."""
    made = dataclass(cls)
    made.__init__ = made_by_former_name(made.__init__)  # type: ignore[method-assign]
    return made


@model_output
class BaseModelOutputWithPast(ModelOutput):
    last_hidden_state: Tensor | None = None  # [B, T, D]
    cache: Cache | None = None
    hidden_states: tuple[Tensor, ...] | None = None  # n_layer + 1 times [B, T, D]
    attentions: tuple[Tensor, ...] | None = None  # n_layer times [B, H, T, C]


@model_output
class CausalLMOutputWithPast(ModelOutput):
    loss: Tensor | None = None
    logits: Tensor | None = None  # [B, T, V], T as `logits_to_keep` says
    cache: Cache | None = None
    hidden_states: tuple[Tensor, ...] | None = None
    attentions: tuple[Tensor, ...] | None = None


@model_output
class SequenceClassifierOutputWithPast(ModelOutput):
    loss: Tensor | None = None
    logits: Tensor | None = None  # [B, num_labels]
    cache: Cache | None = None
    hidden_states: tuple[Tensor, ...] | None = None
    attentions: tuple[Tensor, ...] | None = None


@model_output
class QuestionAnsweringModelOutput(ModelOutput):
    loss: Tensor | None = None
    start_logits: Tensor | None = None  # [B, T]
    end_logits: Tensor | None = None  # [B, T]
    hidden_states: tuple[Tensor, ...] | None = None
    attentions: tuple[Tensor, ...] | None = None
