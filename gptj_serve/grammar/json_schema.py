"""`check`: refuses what llguidance would take otherwise than JSON Schema means it.

What llguidance lacks, it refuses by name itself: it only must not be asked to be lenient. Keywords that JSON Schema
doesn't define are annotations to both.
"""

import math
import re
from collections import defaultdict
from collections.abc import Iterator
from decimal import Decimal
from typing import Any
from urllib.parse import unquote

_SCHEMA_KEYWORDS = ("items", "additionalItems", "additionalProperties")
_LIST_KEYWORDS = ("allOf", "anyOf", "oneOf", "prefixItems", "items")
_MAP_KEYWORDS = ("properties", "patternProperties", "$defs", "definitions")
_BOUND_KEYWORDS = ("minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum", "multipleOf")

_NEEDS_UNICODE_ESCAPE = re.compile(r"[\x00-\x07\x0b\x0e-\x1f\x7f]")
"""Control characters for which JSON has no short escape; llguidance writes U+007F only so, too."""


def check(root: Any) -> None:
    """Raises `ValueError` with the reason. `root` is a schema as parsed from JSON."""
    if not isinstance(root, dict | bool):
        raise ValueError("a JSON schema is an object, true or false")
    if isinstance(root, bool):
        return
    if "x-guidance" in root:
        raise ValueError("x-guidance: options of the grammar library can't be set")
    schemas = list(_schemas(root, "#"))
    for path, schema in schemas:
        _check_literals(path, schema)
        _check_bounds(path, schema)
        _check_min_properties(path, schema)
    if not any("$id" in schema for path, schema in schemas if path != "#"):  # or a pointer may start elsewhere
        _check_references_end(root, [schema for _, schema in schemas])


def _schemas(schema: Any, path: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """The schema and all under it, with where they are."""
    if not isinstance(schema, dict):
        return
    yield path, schema
    for keyword in _SCHEMA_KEYWORDS:
        yield from _schemas(schema.get(keyword), f"{path}/{keyword}")
    for keyword in _LIST_KEYWORDS:
        if isinstance(alternatives := schema.get(keyword), list):
            for index, alternative in enumerate(alternatives):
                yield from _schemas(alternative, f"{path}/{keyword}/{index}")
    for keyword in _MAP_KEYWORDS:
        if isinstance(named := schema.get(keyword), dict):
            for name, part in named.items():
                yield from _schemas(part, f"{path}/{keyword}/{name}")


def _check_literals(path: str, schema: dict[str, Any]) -> None:
    for keyword in (*_BOUND_KEYWORDS, "const", "enum"):
        for value in _scalars(schema.get(keyword)):
            if isinstance(value, int | float) and not _is_kept(value):
                raise ValueError(f"{path}/{keyword}: {value!r} is more than a double-precision number can hold")
            if keyword in ("const", "enum") and isinstance(value, str) and _NEEDS_UNICODE_ESCAPE.search(value):
                raise ValueError(f"{path}/{keyword}: {value!r} needs an escape like \\u0000, which is not supported")


def _scalars(value: Any) -> Iterator[Any]:
    if isinstance(value, list):
        for item in value:
            yield from _scalars(item)
    elif isinstance(value, dict):
        yield from _scalars(list(value.values()))
    else:
        yield value


def _is_kept(number: int | float) -> bool:
    """llguidance keeps numbers as doubles, and writes as few digits as tell one double from the next."""
    try:
        return math.isfinite(number) and (isinstance(number, float) or Decimal(repr(float(number))) == number)
    except OverflowError:
        return False


def _check_bounds(path: str, schema: dict[str, Any]) -> None:
    """llguidance forgets that a whole number is excluded if the other bound is less than 1 away."""
    parts = [schema, *(part for part in _list(schema.get("allOf")) if isinstance(part, dict))]

    def values(*keywords: str) -> list[float]:
        found = (part.get(keyword) for part in parts for keyword in keywords)
        return [value for value in found if isinstance(value, int | float) and not isinstance(value, bool)]

    for excluded, others, sign in (
        ("Minimum", values("maximum", "exclusiveMaximum"), 1),
        ("Maximum", values("minimum", "exclusiveMinimum"), -1),
    ):
        is_flag = any(part.get(f"exclusive{excluded}") is True for part in parts)  # as in draft 4
        for bound in values(f"exclusive{excluded}", *([excluded.lower()] if is_flag else [])):
            if bound * sign >= 0 and bound % 1 == 0 and any(0 < (other - bound) * sign < 1 for other in others):
                raise ValueError(f"{path}/exclusive{excluded}: {bound} is not supported with another bound so close")


def _check_min_properties(path: str, schema: dict[str, Any]) -> None:
    """Free names may be generated twice, and count once: only the first is certain to be one more."""
    minimum, required = schema.get("minProperties"), schema.get("required", [])
    if isinstance(minimum, int) and isinstance(required, list) and minimum > len(set(map(str, required))) + 1:
        raise ValueError(f"{path}/minProperties: supported only up to one more than the names in required")


def _check_references_end(root: dict[str, Any], schemas: list[dict[str, Any]]) -> None:
    """No reference may lead to what contains itself without end: such a text can be begun and never finished.

    Each reference that can end is found once; those that it keeps from ending wait for it.
    """
    references = {schema["$ref"] for schema in schemas if isinstance(schema.get("$ref"), str)}
    endless = {reference: _target(root, reference) for reference in references}
    waiting: defaultdict[str, list[str]] = defaultdict(list)
    to_try = list(endless)
    while to_try:
        reference = to_try.pop()
        if reference not in endless:
            continue
        blockers = _blockers(endless[reference], endless)
        for blocker in blockers:
            waiting[blocker].append(reference)
        if not blockers:
            del endless[reference]
            to_try += waiting.pop(reference, [])
    if endless:
        raise ValueError(f"$ref {min(endless)}: contains itself without end, so no text matches it")


def _blockers(schema: Any, endless: dict[str, Any]) -> set[str]:
    """Of the references that may be endless, those one of which must be shown to end before the schema is.

    Wherever the answer takes more than looking at `type`, the schema is taken to end.
    """
    if not isinstance(schema, dict) or "const" in schema or "enum" in schema:
        return set()
    if (reference := schema.get("$ref")) in endless:
        return {reference}
    needed = _list(schema.get("allOf"))
    if schema.get("type") == "object" and isinstance(properties := schema.get("properties"), dict):
        needed += [properties[name] for name in _list(schema.get("required")) if name in properties]
    if schema.get("type") == "array" and isinstance(minimum := schema.get("minItems"), int) and minimum > 0:
        first = _list(schema.get("prefixItems"))[:minimum]
        needed += first if len(first) == minimum else [*first, schema.get("items")]
    for part in needed:
        if blockers := _blockers(part, endless):
            return blockers
    for keyword in ("anyOf", "oneOf"):
        alternatives = [_blockers(alternative, endless) for alternative in _list(schema.get(keyword))]
        if alternatives and all(alternatives):
            return set[str]().union(*alternatives)
    return set()


def _list(value: Any) -> list[Any]:
    return list(value) if isinstance(value, list) else []


def _target(root: Any, reference: str) -> Any:
    """What a JSON pointer (RFC 6901) in a fragment points to; None for any other reference."""
    if not reference.startswith("#"):
        return None
    target = root
    for part in unquote(reference[1:]).split("/")[1:]:
        name = part.replace("~1", "/").replace("~0", "~")
        if isinstance(target, dict):
            target = target.get(name)
        else:
            target = (
                target[int(name)] if isinstance(target, list) and name.isdecimal() and int(name) < len(target) else None
            )
    return target
