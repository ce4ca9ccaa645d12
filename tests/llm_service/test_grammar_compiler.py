"""Grammars built beside the steps, and how a selector hears of them."""

from __future__ import annotations

import random
import re
import select
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from llm_service.grammar import Grammar, GrammarVocabulary
from llm_service.grammar_compiler import MAX_KEPT, GrammarCompiler, grammar_vocabulary
from llm_service.response_format import FormatKind, ResponseFormat, grammar_text
from llm_service.tokenizer import load_tokenizer
from tests.checkpoints import make_checkpoint
from tests.llm_service.front_end import SPECIAL, VOCAB_SIZE, make_tokenizer
from tests.llm_service.vocabularies import write_sentencepiece

ABC = 'start: "abc"\n'


@pytest.fixture
def compiler() -> Iterator[GrammarCompiler]:
    made = GrammarCompiler(lambda: grammar_vocabulary(make_tokenizer(), VOCAB_SIZE))
    yield made
    made.close()


def take(compiler: GrammarCompiler, count: int = 1) -> dict[int, Grammar | None]:
    built: dict[int, Grammar | None] = {}
    while len(built) < count:
        assert select.select([compiler], [], [], 10)[0], "nothing comes"
        built |= dict(compiler.take())
    return built


def test_a_selector_hears_of_what_is_built(compiler: GrammarCompiler) -> None:
    assert compiler.take() == []
    compiler.submit(7, ABC)
    compiler.submit(8, "start: (")
    built = take(compiler, 2)
    assert isinstance(built[7], Grammar) and built[8] is None
    assert compiler.take() == [] and not select.select([compiler], [], [], 0)[0]


def test_a_grammar_is_built_once_while_it_is_in_use(compiler: GrammarCompiler) -> None:
    texts = [ABC, ABC, *(f'start: "{letter * 3}"\n' * 1 for letter in "abcd")]
    for key, text in enumerate(texts):
        compiler.submit(key, text)
    built = take(compiler, len(texts))
    assert built[0] is built[1] is not built[2]
    for key in range(MAX_KEPT + 1):
        compiler.submit(key, f'start: "{"e" * (key + 1)}"\n')
    take(compiler, MAX_KEPT + 1)
    compiler.submit(0, ABC)
    assert take(compiler)[0] is not built[0]


def test_without_a_vocabulary_every_grammar_fails() -> None:
    def fail() -> GrammarVocabulary:
        raise OSError("no tokenizer")

    compiler = GrammarCompiler(fail)
    compiler.submit(1, ABC)
    assert take(compiler) == {1: None}
    compiler.close()


@pytest.mark.parametrize(("family", "format"), [("qwen3", "hf"), ("internlm2", "chat")])
def test_a_checkpoints_tokens_are_their_bytes(tmp_path: Path, family: str, format: str) -> None:
    tokenizer = load_tokenizer(make_checkpoint(tmp_path, family, format))
    vocabulary = grammar_vocabulary(tokenizer, tokenizer.vocab_size + 8)
    assert vocabulary.end_id == tokenizer.vocab_size + 8
    ids = tokenizer.encode_plain("The picture. 图", at_start=False)
    assert vocabulary.trie.decode_bytes(ids) == b"".join(map(tokenizer.token_bytes, ids))
    assert all(vocabulary.trie.is_special_token(i) for i in tokenizer.special_tokens.values())


def test_special_tokens_come_from_the_tokenizer() -> None:
    vocabulary = grammar_vocabulary(make_tokenizer(), VOCAB_SIZE)
    assert all(vocabulary.trie.is_special_token(i) for i in range(len(SPECIAL)))


@pytest.mark.parametrize("tokenizer_class", ["InternLM2Tokenizer", "LlamaTokenizer"])
def test_where_sentencepiece_drops_the_first_space_the_decoded_text_fulfils_the_grammar(
    tmp_path: Path, tokenizer_class: str
) -> None:
    folder = write_sentencepiece(tmp_path, add_dummy_prefix=True, tokenizer_class=tokenizer_class)
    tokenizer = load_tokenizer(folder)
    vocabulary = grammar_vocabulary(tokenizer, tokenizer.vocab_size)
    pattern = "(the| {1,2}dogs) picture[.]"
    rule = ResponseFormat(FormatKind.REGEX, pattern).rule()
    grammar = Grammar(grammar_text(rule, tokenizer.strips_leading_space), vocabulary)
    words = np.zeros(vocabulary.num_words, np.int32)
    for seed in range(8):
        state, choose, token_ids = grammar.start(), random.Random(seed), []
        while True:
            state.fill(words, (), may_end=True)
            allowed = np.flatnonzero(np.unpackbits(words.view(np.uint8), bitorder="little")).tolist()
            assert not state.has_failed
            if not allowed:
                break
            token_ids.append(choose.choice(allowed))
            state.accept(token_ids[-1])
        text = tokenizer.decode(token_ids)
        assert re.fullmatch(pattern, text), (text, token_ids)
