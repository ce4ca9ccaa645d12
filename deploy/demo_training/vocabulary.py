"""The demo model's tokenizer: bytes, and whole words behind a space.

Merges lengthen a word only from its leading space on, letter by letter. Text that is read off a picture
begins an answer and so has no space before it: it stays characters, and what the model learns to copy
are the characters it sees.
"""

from __future__ import annotations

from collections.abc import Iterable

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

from deploy.random_checkpoint import SPECIAL_TOKENS

SPACE = "\u0120"  # the glyph of a space in byte-level vocabularies


def make_tokenizer(words: Iterable[str]) -> Tokenizer:
    """A byte-level BPE with one token for " " + word of each of `words` (ASCII letters)."""
    glyphs = sorted(pre_tokenizers.ByteLevel.alphabet())
    pieces = {glyph: number for number, glyph in enumerate(glyphs)}
    merges: list[tuple[str, str]] = []
    for word in sorted(set(words)):
        piece = SPACE
        for letter in word:
            merged = piece + letter
            if merged not in pieces:
                merges.append((piece, letter))
                pieces[merged] = len(pieces)
            piece = merged
    tokenizer = Tokenizer(models.BPE(vocab=pieces, merges=merges))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(token, normalized=False) for token in SPECIAL_TOKENS])
    return tokenizer
