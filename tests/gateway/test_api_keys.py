from __future__ import annotations

import hashlib
from pathlib import Path

import pytest

from gateway.api_keys import KeyRing, hash_keys, load_keys

KEY = "sk-0123456789abcdef0123"


def digest(key: str) -> str:
    return hashlib.sha256(key.encode()).hexdigest()


def test_a_key_is_found_by_what_it_is_and_only_so(tmp_path: Path) -> None:
    file = tmp_path / "keys"
    file.write_text(f"# ours\n\nalice {digest(KEY)}\nbob\t{digest('b' * 30).upper()}  # until May\n")
    keys = load_keys(str(file), hash_keys(f"{'c' * 30}, {'d' * 30}"))
    assert len(keys) == 4
    found = [keys.find(key) for key in (KEY, "b" * 30, "c" * 30, "d" * 30)]
    assert [key.name for key in found if key] == ["alice", "bob", "setting-1", "setting-2"]
    for wrong in ("", KEY[:-1], KEY + "x", KEY.upper(), digest(KEY), "alice", "\udcff\u00e9"):
        assert keys.find(wrong) is None


def test_no_keys_are_no_keys() -> None:
    assert not load_keys("", hash_keys("")) and KeyRing([]).find("") is None


@pytest.mark.parametrize(
    "line", ["alice", f"alice {KEY}", digest(KEY), f"a b {digest(KEY)}", f"a {digest(KEY)[1:]}"]
)
def test_a_bad_line_is_told_by_its_number_and_not_repeated(line: str, tmp_path: Path) -> None:
    file = tmp_path / "keys"
    file.write_text(f"bob {digest('b')}\n{line}\n")
    with pytest.raises(ValueError, match="line 2") as caught:
        load_keys(str(file), ())
    assert line not in str(caught.value)


def test_a_name_comes_once(tmp_path: Path) -> None:
    file = tmp_path / "keys"
    file.write_text(f"bob {digest('b')}\nbob {digest('c')}\n")
    with pytest.raises(ValueError, match="same name"):
        load_keys(str(file), ())


def test_a_short_key_and_a_hash_that_is_none_are_refused() -> None:
    with pytest.raises(ValueError, match="key 2 has fewer") as caught:
        hash_keys(f"{KEY},guessme")
    assert "guessme" not in str(caught.value)
    with pytest.raises(ValueError, match="number 1"):
        load_keys("", [KEY])
