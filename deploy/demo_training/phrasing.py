"""Puts questions the way users type them; knows nothing of what is asked."""

from __future__ import annotations

import random
from collections.abc import Sequence


def phrase(rng: random.Random, templates: Sequence[str], **words: str) -> str:
    """One of `templates`, now and then in lower case or without its last mark; `words` keep their letters."""
    template = rng.choice(templates)
    manner = rng.random()
    if manner < 0.2:
        template = template.lower()
    if manner < 0.12 or manner > 0.95:
        template = template.rstrip("?.!")
    return template.format(**words)


def with_article(words: str) -> str:
    return f"an {words}" if words[0] in "aeiou" else f"a {words}"


def plural(shape: str) -> str:
    return f"{shape}es" if shape.endswith("s") else f"{shape}s"


def join_list(items: Sequence[str]) -> str:
    """'a', 'a and b', 'a, b and c'."""
    return " and ".join((", ".join(items[:-1]), items[-1])) if len(items) > 1 else items[0]
