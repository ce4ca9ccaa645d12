"""Which tokens a grammar allows, and that whatever it lets random tokens write is valid."""

from __future__ import annotations

import json
import random
import time
from collections.abc import Callable

import jsonschema
import numpy as np
import pytest

from llm_service.grammar import Grammar, GrammarError, GrammarState, GrammarVocabulary, probe
from llm_service.response_format import FormatKind, ResponseFormat, grammar_text

END_IDS = (256, 260)
TOKENS = [bytes([byte]) for byte in range(256)] + [b"", b'{"', b'":', b"abc", b""]


def vocabulary() -> GrammarVocabulary:
    return GrammarVocabulary(TOKENS, lambda text: list(text.encode()))


def text_of(form: ResponseFormat) -> str:
    return grammar_text(form.rule(), strips_leading_space=False)


def start(form: ResponseFormat) -> GrammarState:
    return Grammar(text_of(form), vocabulary()).start()


def allowed(state: GrammarState, may_end: bool = True) -> set[int]:
    words = np.full(state.num_words, -1, np.int32)
    state.fill(words, END_IDS, may_end)
    return set(np.flatnonzero(np.unpackbits(words.view(np.uint8), bitorder="little")).tolist())


def write(state: GrammarState, seed: int = 0, most: int = 2000) -> bytes:
    """Random allowed tokens until the end."""
    choose, written = random.Random(seed), b""
    for _ in range(most):
        token_id = choose.choice(sorted(allowed(state)))
        if token_id in END_IDS:
            return written
        written += TOKENS[token_id]
        state.accept(token_id)
    raise AssertionError(f"no end in {written[:200]!r}")


def choice(*texts: str) -> ResponseFormat:
    return ResponseFormat(FormatKind.CHOICE, choices=texts)


def test_only_tokens_that_go_on_with_the_text_are_allowed() -> None:
    state = start(choice("abc", "ax"))
    assert allowed(state) == {ord("a"), TOKENS.index(b"abc")}
    state.accept(ord("a"))
    assert allowed(state) == {ord("b"), ord("x")}
    state.accept(ord("x"))
    assert allowed(state) == set(END_IDS)


def test_an_answer_that_may_end_waits_for_min_tokens_unless_nothing_else_can_come() -> None:
    state = start(choice("a", "ab"))
    state.accept(ord("a"))
    assert allowed(state) == {ord("b"), *END_IDS}
    assert allowed(state, may_end=False) == {ord("b")}
    state.accept(ord("b"))
    assert allowed(state, may_end=False) == set(END_IDS)


@pytest.mark.parametrize("encode", [lambda text: [], lambda text: [32, *text.encode()]])
def test_a_forced_text_is_spelled_where_encoding_does_not_give_its_bytes(
    encode: Callable[[str], list[int]],
) -> None:
    state = Grammar(text_of(choice("xabcy")), GrammarVocabulary(TOKENS, encode)).start()
    for token_id in (ord("x"), TOKENS.index(b"abc"), ord("y")):
        assert allowed(state) == {token_id}
        state.accept(token_id)
    assert allowed(state) == set(END_IDS)


def test_a_text_that_no_token_spells_fails() -> None:
    state = Grammar('start: "a" /[0-9]/\n', GrammarVocabulary([b"a", b"b"], lambda text: [])).start()
    words = np.zeros(state.num_words, np.int32)
    state.fill(words, (1,), may_end=True)
    assert words[0] == 1 and not state.has_failed
    state.accept(0)
    state.fill(words, (1,), may_end=True)
    assert words[0] == 2 and state.has_failed


def test_states_of_one_grammar_are_independent() -> None:
    grammar = Grammar(text_of(choice("ab", "cd")), vocabulary())
    first, second = grammar.start(), grammar.start()
    first.accept(ord("a"))
    assert allowed(first) == {ord("b")} and allowed(second) == {ord("a"), ord("c")} | {
        TOKENS.index(b"abc")
    } - {259}


def test_special_and_unused_tokens_are_never_text() -> None:
    state = start(ResponseFormat(FormatKind.REGEX, "(?s:.){0,20}"))
    assert allowed(state) & {256, 260} == {256, 260}, "it may end"
    state = start(ResponseFormat(FormatKind.REGEX, "(?s:.){1,20}"))
    assert not allowed(state) & {256, 260}


@pytest.mark.parametrize(
    "text", ['say "hi"', "line\nend", "back\\slash", "/x/", "é😀", "a{1}|b", "\x01", "%json {}"]
)
def test_choices_are_taken_letter_for_letter(text: str) -> None:
    assert write(start(choice(text))) == text.encode()


@pytest.mark.parametrize(
    ("pattern", "matching"),
    [
        (r"\d{3}/\d", b"123/4"),
        ("^a+$", b"a"),
        ("[äö]+", "ö".encode()),
        ("(?i)yes", b"YeS"),
        ("x\ny", b"x\ny"),
    ],
)
def test_a_pattern_has_to_match_the_whole_text(pattern: str, matching: bytes) -> None:
    state = start(ResponseFormat(FormatKind.REGEX, pattern))
    for byte in matching:
        assert byte in allowed(state)
        state.accept(byte)
    assert END_IDS[0] in allowed(state)


def test_any_object_is_an_object() -> None:
    for seed in range(5):
        state = start(ResponseFormat(FormatKind.JSON_OBJECT))
        assert allowed(state) == {ord("{"), TOKENS.index(b'{"')}
        for token_id in b'{"a": [1, {"b": "\xc3\xa9"}, null]}':
            assert token_id in allowed(state)
            state.accept(token_id)
        assert allowed(state) == set(END_IDS), seed


def test_white_space_comes_to_an_end() -> None:
    state = start(ResponseFormat(FormatKind.JSON_OBJECT))
    state.accept(ord("{"))
    for _ in range(40):
        assert ord(" ") in allowed(state)
        state.accept(ord(" "))
    assert not allowed(state) & set(b" \n\t")


def test_where_decoding_drops_the_first_space_the_tokens_spell_one() -> None:
    text = grammar_text(choice("abc").rule(), strips_leading_space=True)
    assert write(Grammar(text, vocabulary()).start()) == b" abc"


@pytest.mark.parametrize("seed", [1, 2, 3])
def test_random_bytes_fulfil_a_recursive_schema(seed: int) -> None:
    schema = {
        "type": "object",
        "properties": {"v": {"enum": [1, "é"]}, "next": {"anyOf": [{"type": "null"}, {"$ref": "#"}]}},
        "required": ["v", "next"],
        "additionalProperties": False,
    }
    written = write(start(ResponseFormat(FormatKind.JSON_SCHEMA, json.dumps(schema))), seed)
    jsonschema.validate(json.loads(written), schema)


def nested(opening: str, inner: str, closing: str, depth: int) -> str:
    return opening * depth + inner + closing * depth


def doubling_unions(depth: int) -> dict[str, object]:
    defs: dict[str, object] = {f"a{depth}": {"type": "string"}}
    for level in range(depth):
        defs[f"a{level}"] = {"anyOf": [{"$ref": f"#/$defs/a{level + 1}"}] * 2}
    return {"$defs": defs, "$ref": "#/$defs/a0"}


HOSTILE = {
    "unknown type": {"type": "strng"},
    "unsupported keyword": {"not": {"type": "string"}},
    "dangling reference": {"$ref": "#/$defs/nowhere"},
    "outside reference": {"$ref": "https://example.com/schema.json"},
    "nothing fulfils it": {"type": "string", "minLength": 3, "maxLength": 2},
    "bad pattern": {"type": "string", "pattern": "(a"},
    "look-around": {"type": "string", "pattern": "(?=a)b"},
    "exploding product": {
        "allOf": [
            {"anyOf": [{"properties": {f"a{i}_{j}": {"type": "string"}}} for j in range(4)]}
            for i in range(12)
        ]
    },
    "exploding intersection": {
        "type": "string",
        "allOf": [{"pattern": f"^.*a.{{{10 + i}}}$"} for i in range(10)],
    },
    "thousands of optional properties": {
        "type": "object",
        "properties": {f"p{i}": {"type": "string"} for i in range(3000)},
    },
    "overlapping oneOf": {"oneOf": [{"type": "integer"}, {"type": "number"}]},
}


@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_schema_is_refused(name: str) -> None:
    with pytest.raises(GrammarError):
        probe(text_of(ResponseFormat(FormatKind.JSON_SCHEMA, json.dumps(HOSTILE[name]))))


@pytest.mark.parametrize(
    "schema",
    [
        nested('{"type":"array","items":', "{}", "}", 5000),
        nested('{"allOf":[', "{}", "]}", 5000),
        json.dumps({"type": "string", "pattern": nested("(", "a", ")", 5000)}),
        json.dumps({"type": "string", "pattern": nested("(", "a", "){1,100}", 6)}),
        json.dumps({"type": "array", "minItems": 10**9, "items": {"type": "array", "minItems": 10**9}}),
        json.dumps(doubling_unions(40)),
        json.dumps({"enum": [f"x{i}" for i in range(15000)]}),
    ],
)
def test_large_and_deep_schemas_take_less_than_a_second_one_way_or_the_other(schema: str) -> None:
    began = time.process_time()
    try:
        probe(text_of(ResponseFormat(FormatKind.JSON_SCHEMA, schema)))
    except (GrammarError, ValueError) as error:
        assert str(error)
    except Exception as error:
        assert type(error).__name__ == "InvalidRequest"
    assert time.process_time() - began < 1.0
