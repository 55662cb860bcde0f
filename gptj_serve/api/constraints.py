"""What the text must match: from the ways in which clients say it to a `Grammar`.

Schemas are checked to be JSON here; whether they, expressions and grammars can be followed is the engine's to say.
"""

import json
from typing import Any, NamedTuple

from gptj_serve.api.huggingface_schemas import TextGrammar
from gptj_serve.api.openai_sampling import OpenAISampling, ResponseFormat, StructuredOutputs
from gptj_serve.errors import InvalidRequestError
from gptj_serve.types import Grammar, GrammarKind

ANY_OBJECT = Grammar(GrammarKind.JSON_SCHEMA, '{"type": "object"}')


class Constraint(NamedTuple):
    """A grammar, and the field that it came in."""

    field: str
    grammar: Grammar


def constraint_of_completion(body: OpenAISampling) -> Constraint | None:
    """vLLM's `structured_outputs`, its older `guided_…`, or OpenAI's `response_format`; only one of them."""
    found: list[Constraint] = []
    if body.structured_outputs is not None:
        found += _structured_outputs(body.structured_outputs)
    if body.guided_json is not None:
        found.append(_json_schema("guided_json", body.guided_json))
    if body.guided_regex is not None:
        found.append(Constraint("guided_regex", Grammar(GrammarKind.REGEX, body.guided_regex)))
    if body.guided_choice is not None:
        found.append(_choice("guided_choice", body.guided_choice))
    if body.guided_grammar is not None:
        found.append(Constraint("guided_grammar", Grammar(GrammarKind.LARK, body.guided_grammar)))
    if body.response_format is not None:
        found += _response_format(body.response_format)
    if len(found) > 1:
        raise InvalidRequestError(found[1].field, found[1].grammar.text, f"goes without {found[0].field} only")
    return found[0] if found else None


def constraint_of_generation(grammar: TextGrammar | None) -> Constraint | None:
    """Text Generation Inference's `grammar`."""
    if grammar is None:
        return None
    field, value = "parameters.grammar.value", grammar.value
    match grammar.type:
        case "json" | "json_object":
            return _json_schema(field, value)
        case "json_schema":
            if not isinstance(value, dict) or "schema" not in value or value.keys() - {"name", "schema"}:
                raise InvalidRequestError(field, value, 'must be {"schema": …}, if you like with a "name"')
            return _json_schema(f"{field}.schema", value["schema"])
        case "choice":
            texts = [text for text in value if isinstance(text, str) and text] if isinstance(value, list) else []
            if not texts or texts != value:
                raise InvalidRequestError(field, value, "must be a list of strings")
            return _choice(field, texts)
        case "regex" | "lark":
            if not isinstance(value, str) or not value:
                raise InvalidRequestError(field, value, "must be a string")
            return Constraint(field, Grammar(GrammarKind(grammar.type), value))


def _structured_outputs(outputs: StructuredOutputs) -> list[Constraint]:
    field = "structured_outputs"
    found: list[Constraint] = []
    if outputs.json_schema is not None:
        found.append(_json_schema(f"{field}.json", outputs.json_schema))
    if outputs.json_object:
        found.append(Constraint(f"{field}.json_object", ANY_OBJECT))
    if outputs.regex is not None:
        found.append(Constraint(f"{field}.regex", Grammar(GrammarKind.REGEX, outputs.regex)))
    if outputs.choice is not None:
        found.append(_choice(f"{field}.choice", outputs.choice))
    if outputs.grammar is not None:
        found.append(Constraint(f"{field}.grammar", Grammar(GrammarKind.LARK, outputs.grammar)))
    if not found:
        raise InvalidRequestError(field, {}, "must have one of json, json_object, regex, choice, grammar")
    return found


def _response_format(response_format: ResponseFormat) -> list[Constraint]:
    named = response_format.json_schema
    if (response_format.type == "json_schema") != (named is not None):
        reason = "goes with type json_schema, and that with it"
        raise InvalidRequestError("response_format.json_schema", None if named is None else named.schema_, reason)
    if response_format.value is not None and response_format.type != "json_object":
        raise InvalidRequestError("response_format.value", response_format.value, "goes with type json_object only")
    if response_format.value is not None:
        return [_json_schema("response_format.value", response_format.value)]
    if named is not None:
        return [_json_schema("response_format.json_schema.schema", named.schema_)]
    return [Constraint("response_format", ANY_OBJECT)] if response_format.type == "json_object" else []


def _json_schema(field: str, schema: Any) -> Constraint:
    """The order of properties is kept: they are generated in it."""
    try:
        parsed = json.loads(schema) if isinstance(schema, str) else schema
        if not isinstance(parsed, dict):
            raise InvalidRequestError(field, schema, "must be a JSON schema: an object, or one written as a string")
        text = json.dumps(parsed, allow_nan=False)
        json.dumps(parsed, ensure_ascii=False).encode()  # half a surrogate pair, in a schema that came as a string
    except (ValueError, RecursionError) as error:
        raise InvalidRequestError(field, schema, f"not valid JSON: {error}") from None
    return Constraint(field, Grammar(GrammarKind.JSON_SCHEMA, text))


def _choice(field: str, texts: list[str]) -> Constraint:
    return Constraint(field, Grammar(GrammarKind.CHOICE, json.dumps(texts)))
