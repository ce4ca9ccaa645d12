"""Grammars for the engine, built in a thread of their own so that no step waits for one."""

from __future__ import annotations

import logging
import socket
from collections import OrderedDict
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from queue import Empty, SimpleQueue

from llm_service.call_form import INTERNLM
from llm_service.grammar import Grammar, GrammarVocabulary
from llm_service.tokenizer import Tokenizer

MAX_KEPT = 64  # a program asks for the same few forms again and again

log = logging.getLogger(__name__)


class GrammarCompiler:
    """Builds grammars one at a time; the vocabulary comes first, while the model still loads.

    A selector may wait for it: it can be read when there is something to `take`.
    """

    def __init__(self, load_vocabulary: Callable[[], GrammarVocabulary]) -> None:
        self._executor = ThreadPoolExecutor(1, "grammars")
        self._vocabulary = self._executor.submit(load_vocabulary)
        self._kept: OrderedDict[str, Grammar] = OrderedDict()  # touched by that thread only
        self._built: SimpleQueue[tuple[int, Grammar | None]] = SimpleQueue()
        self._readable, self._signal = socket.socketpair()
        self._readable.setblocking(False)
        self._signal.setblocking(False)

    def fileno(self) -> int:
        return self._readable.fileno()

    def submit(self, key: int, text: str) -> None:
        """Build it; `take` gives it with its key."""
        self._executor.submit(self._build, key, text)

    def take(self) -> list[tuple[int, Grammar | None]]:
        """What was built since the last call; None for a grammar that cannot be."""
        with suppress(BlockingIOError):
            self._readable.recv(4096)
        built = []
        with suppress(Empty):
            while True:
                built.append(self._built.get_nowait())
        return built

    def close(self) -> None:
        self._executor.shutdown(cancel_futures=True)
        self._readable.close()
        self._signal.close()

    def _build(self, key: int, text: str) -> None:
        try:
            grammar = self._kept.pop(text, None) or Grammar(text, self._vocabulary.result())
        except Exception:  # of the library, or of the vocabulary that could not be loaded
            log.exception("a grammar could not be built")
            self._put(key, None)
            return
        self._kept[text] = grammar
        if len(self._kept) > MAX_KEPT:
            self._kept.popitem(last=False)
        self._put(key, grammar)

    def _put(self, key: int, grammar: Grammar | None) -> None:
        self._built.put((key, grammar))
        with suppress(BlockingIOError):  # full: it can be read already
            self._signal.send(b"\0")


def grammar_vocabulary(tokenizer: Tokenizer, vocab_size: int) -> GrammarVocabulary:
    """Of the first `vocab_size` ids; added tokens that are not special count as their text.

    Of the special ones, grammars may name those that mark calls.
    """

    def text_bytes(token_id: int) -> bytes:
        is_text = token_id < tokenizer.vocab_size and not tokenizer.is_special(token_id)
        return tokenizer.token_bytes(token_id) if is_text else b""

    tokens = [text_bytes(token_id) for token_id in range(vocab_size)]
    ids = {name: tokenizer.special_tokens.get(name, vocab_size) for name in INTERNLM.tokens}
    specials = {name: token_id for name, token_id in ids.items() if token_id < vocab_size}
    return GrammarVocabulary(tokens, lambda text: tokenizer.encode_plain(text, at_start=False), specials)
