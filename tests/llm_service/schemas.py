"""Schemas as programs send them, small enough that random tokens come to an end."""

from __future__ import annotations

from typing import Any

WORD = {"type": "string", "maxLength": 8}


def closed(properties: dict[str, Any], **more: Any) -> dict[str, Any]:
    """As OpenAI's strict mode wants objects."""
    schema = {"type": "object", "properties": properties, "required": list(properties)}
    return schema | {"additionalProperties": False} | more


def listed(items: Any, most: int = 3, **more: Any) -> dict[str, Any]:
    return {"type": "array", "items": items, "maxItems": most, **more}


SCHEMAS: list[dict[str, Any]] = [
    closed({"name": WORD}),
    closed({"name": WORD, "age": {"type": "integer", "minimum": 0, "maximum": 150}}),
    closed({"a": {"type": "boolean"}, "b": {"type": "null"}}),
    closed({"x": {"type": "number"}, "y": {"type": "number"}}),
    closed({"x": {"type": "number", "minimum": -1.5, "maximum": 2.25}}),
    closed({"n": {"type": "integer", "exclusiveMinimum": 10, "exclusiveMaximum": 13}}),
    closed({"n": {"type": "integer", "multipleOf": 7, "minimum": 0, "maximum": 1000}}),
    closed({"colour": {"enum": ["red", "green", "blue"]}}),
    closed({"mixed": {"enum": ["a", 1, 2.5, True, None, [1], {"k": "v"}]}}),
    closed({"kind": {"const": "cat"}}),
    closed({"text": {"const": 'quotes " and \\ and \n'}}),
    closed({"名前": {"enum": ["猫", "犬", "🐈‍⬛"]}}),
    closed({"ключ": WORD, "clé": {"const": "é"}}),
    closed({"code": {"type": "string", "pattern": "^[A-Z]{3}-[0-9]{2,4}$"}}),
    closed({"code": {"type": "string", "pattern": "^(a|b|cd){1,5}$"}}),
    closed({"plate": {"type": "string", "pattern": r"^\d{3} [äöü]{2}$"}}),
    closed({"day": {"type": "string", "format": "date"}}),
    closed({"ip6": {"type": "string", "format": "ipv6"}}),
    closed({"id": {"type": "string", "format": "uuid"}}),
    closed({"ip": {"type": "string", "format": "ipv4"}}),
    closed({"short": {"type": "string", "minLength": 2, "maxLength": 4}}),
    closed({"empty": {"type": "string", "maxLength": 0}}),
    closed({"tags": listed(WORD)}),
    closed({"tags": listed({"enum": ["x", "y"]}, minItems=2)}),
    closed(
        {"pair": {"type": "array", "prefixItems": [WORD, {"type": "integer"}], "items": False, "minItems": 2}}
    ),
    closed({"matrix": listed(listed({"enum": [0, 1]}, 2, minItems=2), 2, minItems=2)}),
    closed({"value": {"anyOf": [{"type": "integer"}, WORD, {"type": "null"}]}}),
    closed({"value": {"type": ["string", "null"], "maxLength": 5}}),
    closed({"shape": {"anyOf": [closed({"r": {"type": "integer"}}), closed({"w": {"type": "integer"}})]}}),
    closed({"pet": {"oneOf": [closed({"t": {"const": "cat"}}), closed({"t": {"const": "dog"}, "n": WORD})]}}),
    closed({"all": {"allOf": [{"type": "integer", "minimum": 3}, {"maximum": 9}]}}),
    closed({"deep": closed({"deeper": closed({"deepest": closed({"end": {"type": "boolean"}})})})}),
    closed({"head": {"$ref": "#/$defs/word"}}, **{"$defs": {"word": WORD}}),
    closed(
        {"v": {"enum": [1, 2]}, "next": {"anyOf": [{"type": "null"}, {"$ref": "#"}]}},
    ),
    {
        "$ref": "#/$defs/node",
        "$defs": {"node": closed({"leaf": {"type": "boolean"}, "kids": listed({"$ref": "#/$defs/node"}, 1)})},
    },
    {
        "$ref": "#/$defs/a",
        "$defs": {
            "a": closed({"b": {"anyOf": [{"$ref": "#/$defs/b"}, {"type": "null"}]}}),
            "b": closed({"a": {"anyOf": [{"$ref": "#/$defs/a"}, {"type": "null"}]}}),
        },
    },
    {
        "definitions": {
            "list": {
                "anyOf": [
                    {"type": "null"},
                    closed({"car": {"enum": [0]}, "cdr": {"$ref": "#/definitions/list"}}),
                ]
            }
        },
        "$ref": "#/definitions/list",
    },
    {"type": "object", "properties": {"a": WORD, "b": WORD}, "additionalProperties": False},
    {
        "type": "object",
        "properties": {"a": WORD},
        "required": ["a"],
        "additionalProperties": False,
        "title": "T",
        "description": "d",
    },
    {
        "type": "object",
        "patternProperties": {"^x[0-9]$": {"type": "boolean"}},
        "additionalProperties": False,
        "maxProperties": 2,
    },
    listed({"type": "integer"}, 4),
    listed(closed({"id": {"type": "integer", "minimum": 1, "maximum": 99}}), 2, minItems=1),
    {"type": "string", "maxLength": 12},
    {"type": "integer", "minimum": -5, "maximum": 5},
    {"type": "boolean"},
    {"type": "null"},
    {"enum": ["yes", "no", "maybe"]},
    {"anyOf": [{"type": "integer"}, {"type": "boolean"}]},
    {"const": {"fixed": [1, 2, {"three": None}]}},
    closed({f"field{number}": {"type": "boolean"} for number in range(12)}),
    closed({"box": listed({"type": "integer", "minimum": 0, "maximum": 1000}, 4, minItems=4), "label": WORD}),
    closed({"email": {"type": "string", "pattern": r"^[a-z]{1,6}@[a-z]{1,6}\.(com|org)$"}}),
    closed({"escaped": {"enum": ["tab\t", "nul\u0000", "slash/", "</script>", "\u2028"]}}),
]
