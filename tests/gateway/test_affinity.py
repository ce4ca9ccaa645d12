"""Which requests count as one conversation."""

from __future__ import annotations

from gateway.affinity import MEDIUM_SAMPLE_BYTES, conversation_key
from gateway.conversation import Picture, Text, Turn


def turn(role: str, *parts: str | bytes) -> Turn:
    made = (Text(part, "") if isinstance(part, str) else Picture(part, "", "") for part in parts)
    return Turn(role, tuple(made))


OPENING = (turn("system", "be brief"), turn("user", b"a cat", "what is this?"))


def test_later_turns_have_the_key_of_the_first() -> None:
    later = (*OPENING, turn("assistant", "a cat"), turn("user", "which colour?", b"another cat"))
    assert conversation_key(later) == conversation_key(OPENING)


def test_other_beginnings_have_other_keys() -> None:
    others = [
        OPENING,
        (turn("system", "be kind"), OPENING[1]),
        (OPENING[1],),
        (OPENING[0], turn("user", b"a dog", "what is this?")),
        (OPENING[0], turn("user", b"a cat", "what is that?")),
        (OPENING[0], turn("user", "what is this?", b"a cat")),
        (OPENING[0], turn("user", "a cat", "what is this?")),
        (OPENING[0], turn("user", "a catwhat is this?")),
    ]
    assert len({conversation_key(turns) for turns in others}) == len(others)


def test_cache_salt_and_cache_key_tell_conversations_apart() -> None:
    keys = {conversation_key(OPENING, salt, key) for salt in ("", "a", "ab") for key in ("", "b", "ab")}
    assert len(keys) == 9


def test_large_pictures_are_told_apart_by_length_and_ends() -> None:
    blank = bytes(4 * MEDIUM_SAMPLE_BYTES)
    pictures = [blank, blank + b"\0", b"\1" + blank[1:], blank[1:] + b"\1"]
    assert len({conversation_key([turn("user", picture)]) for picture in pictures}) == 4


def test_urls_are_told_apart() -> None:
    pictures = [Picture(b"", "", "", url=url) for url in ("https://a.example/1", "https://a.example/2", "")]
    assert len({conversation_key([Turn("user", (picture,))]) for picture in pictures}) == 3


def test_a_conversation_without_a_user_has_a_key_too() -> None:
    assert conversation_key(()) != conversation_key((turn("assistant", "hello"),))
