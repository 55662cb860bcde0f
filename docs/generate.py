"""Writes the two references: docs/configuration.md from the config classes, docs/http-api.md from the OpenAPI schema.

    python docs/generate.py

A test compares what is committed with what this would write.
"""

import json
import types
import typing
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, Union, cast

from pydantic import BaseModel
from pydantic.fields import FieldInfo
from pydantic_core import PydanticUndefined

from gptj_serve.api.app import create_app
from gptj_serve.api.service import EngineClient, Service
from gptj_serve.config import ServiceConfig
from gptj_serve.model.checkpoint import Checkpoint
from gptj_serve.tokenizer import Tokenizer

DIRECTORY = Path(__file__).parent
SOURCE = "<!-- Written by docs/generate.py: edit the descriptions in the code, not this file. -->\n"

METHODS = ("get", "post", "put", "delete")

UNITS = {
    "_s": "seconds",
    "_bytes": "bytes",
    "_tokens": "tokens",
    "block_size": "tokens",
    "num_cpus": "CPUs",
    "num_gpus": "GPUs",
}


def main() -> None:
    for name, text in documents().items():
        (DIRECTORY / name).write_text(text, encoding="utf-8")


def documents() -> dict[str, str]:
    """By file name."""
    return {"configuration.md": configuration_reference(), "http-api.md": http_reference(openapi_schema())}


# ── configuration ────────────────────────────────────────────────────────────────────────────────────────────


def configuration_reference() -> str:
    lines = [
        "# Configuration",
        SOURCE,
        "What a deployment file can set under `args`, as in [deployments/gptj.yaml](../deployments/gptj.yaml). An "
        "unknown field or a value out of its bounds ends the start with an error that names it.",
    ]
    for path, part in _parts(ServiceConfig, ""):
        lines += ["", f"## `{path}`" if path else "## `args`"]
        if path and part.__doc__:
            lines += ["", part.__doc__.strip().splitlines()[0]]
        lines += ["", "| field | type | unit | default | what it does |", "|---|---|---|---|---|"]
        for name, field in part.model_fields.items():
            if _part_of(field) is None or _is_optional(field):
                type_text = _type_text(field) if _part_of(field) is None else f"[fields](#{name}) or none"
                cells = [f"`{name}`", type_text, _unit(name), _default_text(field), field.description or ""]
                lines.append(_row(cells))
    return "\n".join(lines) + "\n"


def _parts(part: type[BaseModel], path: str) -> Iterator[tuple[str, type[BaseModel]]]:
    """A config class and those inside it, with their dotted paths."""
    yield path, part
    for name, field in part.model_fields.items():
        inner = _part_of(field)
        if inner is not None:
            yield from _parts(inner, f"{path}.{name}" if path else name)


def _part_of(field: FieldInfo) -> type[BaseModel] | None:
    annotations = typing.get_args(field.annotation) if _is_optional(field) else [field.annotation]
    parts = [each for each in annotations if isinstance(each, type) and issubclass(each, BaseModel)]
    return parts[0] if parts else None


def _is_optional(field: FieldInfo) -> bool:
    return type(None) in typing.get_args(field.annotation)


def _unit(name: str) -> str:
    return next((unit for ending, unit in UNITS.items() if name.endswith(ending)), "")


def _type_text(field: FieldInfo) -> str:
    bounds = [_bound_text(bound) for bound in field.metadata]
    return " ".join([_annotation_text(field.annotation), *filter(None, bounds)])


def _bound_text(bound: Any) -> str:
    signs = {"gt": ">", "ge": "≥", "lt": "<", "le": "≤"}
    return ", ".join(f"{sign} {getattr(bound, name)}" for name, sign in signs.items() if hasattr(bound, name))


def _annotation_text(annotation: Any) -> str:
    origin, arguments = typing.get_origin(annotation), typing.get_args(annotation)
    if origin is Annotated:
        return " ".join(filter(None, [_annotation_text(arguments[0]), *map(_bound_text, arguments[1:])]))
    if origin in (Union, types.UnionType):
        return " or ".join(_annotation_text(argument) for argument in arguments)
    if origin is Literal:
        return ", ".join(f"`{argument}`" for argument in arguments)
    if origin is not None:
        return f"{origin.__name__} of {', '.join(map(_annotation_text, arguments))}"
    return "none" if annotation is type(None) else str(annotation.__name__)


def _default_text(field: FieldInfo) -> str:
    if field.default is PydanticUndefined:
        return "required" if field.default_factory is None else f"`{field.default_factory()!r}`"  # type: ignore[call-arg]
    return "none" if field.default is None else f"`{json.dumps(field.default)}`"


# ── HTTP ─────────────────────────────────────────────────────────────────────────────────────────────────────


def openapi_schema() -> dict[str, Any]:
    """That of the demo checkpoint's service, which answers every route."""
    config = ServiceConfig()
    checkpoint = Checkpoint.open(config.checkpoint_dir)
    tokenizer = Tokenizer.from_directory(config.checkpoint_dir)
    no_engine = cast(EngineClient, None)  # nothing is asked of it
    return create_app(Service(config, checkpoint.config, checkpoint.heads, tokenizer, no_engine)).openapi()


def http_reference(schema: Mapping[str, Any]) -> str:
    lines = [
        "# HTTP API",
        SOURCE,
        "The same as `GET /docs` of a running service, where every route can be tried. Unknown fields are refused. "
        "[Generation](generation.md) says more about the parameters of a generation, [access](access.md) about keys, "
        "limits and headers.",
    ]
    tag = None
    for path, operations in schema["paths"].items():
        for method in METHODS:
            if method in operations:
                operation = operations[method]
                if operation["tags"][0] != tag:
                    tag = operation["tags"][0]
                    lines += ["", f"## {tag}"]
                lines += _operation(schema, method, path, operation)
    lines += [*_errors(schema), "", "## Objects"]
    for name, component in sorted(schema["components"]["schemas"].items()):
        lines += _object(schema, name, component)
    return "\n".join(lines) + "\n"


def _operation(schema: Mapping[str, Any], method: str, path: str, operation: Mapping[str, Any]) -> Iterator[str]:
    yield from ("", f"### `{method.upper()} {path}`", "", operation.get("summary", ""))
    if operation.get("description"):
        yield from ("", operation["description"].strip())
    parameters = operation.get("parameters", [])
    if parameters:
        yield from ("", "| parameter | in | type | |", "|---|---|---|---|")
        for parameter in parameters:
            cells = [f"`{parameter['name']}`", parameter["in"], _schema_text(parameter["schema"])]
            yield _row([*cells, parameter.get("description", "")])
    if "requestBody" in operation:
        for body in operation["requestBody"]["content"].values():
            yield from ("", f"Body: {_schema_text(body['schema'])}")
    yield from ("", "| status | body | |", "|---|---|---|")
    for status, response in operation["responses"].items():
        if not _is_error(status):
            yield _response_row(status, response)
    errors = [f"[{status}](#errors)" for status in operation["responses"] if _is_error(status)]
    if errors:
        yield from ("", f"Errors: {', '.join(errors)}.")


def _is_error(status: str) -> bool:
    return status >= "400"


def _errors(schema: Mapping[str, Any]) -> Iterator[str]:
    """Each status once, with all that a body of it may be: it means the same on every route."""
    kinds: dict[str, tuple[list[str], str]] = {}
    for operations in schema["paths"].values():
        for operation in operations.values():
            for status, response in filter(lambda item: _is_error(item[0]), operation["responses"].items()):
                bodies, description = kinds.setdefault(status, ([], response.get("description", "")))
                bodies += [kind for kind in _body_kinds(response) if kind not in bodies]
    yield from ("", "## Errors", "", "| status | body | |", "|---|---|---|")
    for status, (bodies, description) in sorted(kinds.items()):
        yield _row([status, " or ".join(bodies), description])


def _response_row(status: str, response: Mapping[str, Any]) -> str:
    return _row([status, "; ".join(_body_kinds(response)), response.get("description", "")])


def _body_kinds(response: Mapping[str, Any]) -> list[str]:
    return [
        f"{_schema_text(content['schema'])} as `{media_type}`" if content.get("schema") else f"`{media_type}`"
        for media_type, content in response.get("content", {}).items()
    ]


def _object(schema: Mapping[str, Any], name: str, component: Mapping[str, Any]) -> Iterator[str]:
    yield from ("", f"### {name}")
    if component.get("description"):
        yield from ("", component["description"].strip())
    if "properties" not in component:
        yield from ("", _schema_text(component))
        return
    yield from ("", "| field | type | default | |", "|---|---|---|---|")
    required = component.get("required", [])
    for field, value in component["properties"].items():
        if "default" in value:
            default = "" if value["default"] is None else f"`{json.dumps(value['default'])}`"
        else:
            default = "required" if field in required else ""
        yield _row([f"`{field}`", _schema_text(value), default, value.get("description", "")])


def _schema_text(schema: Mapping[str, Any]) -> str:
    if "$ref" in schema:
        name = schema["$ref"].rsplit("/", 1)[1]
        return f"[{name}](#{name.lower()})"
    for key in ("anyOf", "oneOf"):
        if key in schema:
            texts = [_schema_text(option) for option in schema[key] if option.get("type") != "null"]
            return " or ".join(dict.fromkeys(texts))
    if "const" in schema:
        return f"`{json.dumps(schema['const'])}`"
    if "enum" in schema:
        return ", ".join(f"`{json.dumps(value)}`" for value in schema["enum"])
    if "prefixItems" in schema:
        return f"[{', '.join(map(_schema_text, schema['prefixItems']))}]"
    if schema.get("type") == "array":
        return f"list of {_schema_text(schema.get('items', {}))}{_bounds(schema, 'Items')}"
    if schema.get("type") == "object" and isinstance(schema.get("additionalProperties"), dict):
        return f"object of {_schema_text(schema['additionalProperties'])}"
    return f"{schema.get('type', 'anything')}{_bounds(schema, 'Length')}"


def _bounds(schema: Mapping[str, Any], sized: str) -> str:
    signs = {"exclusiveMinimum": ">", "minimum": "≥", "exclusiveMaximum": "<", "maximum": "≤"}
    bounds = [f"{sign} {schema[key]}" for key, sign in signs.items() if key in schema]
    bounds += [f"{sign} {schema[k]} long" for k, sign in ((f"min{sized}", "≥"), (f"max{sized}", "≤")) if k in schema]
    return f" ({', '.join(bounds)})" if bounds else ""


def _row(cells: list[str]) -> str:
    return "| " + " | ".join(" ".join(cell.split()).replace("|", "\\|") for cell in cells) + " |"


if __name__ == "__main__":
    main()
