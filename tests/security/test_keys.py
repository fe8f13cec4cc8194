"""CURVE key pairs and their files."""

from __future__ import annotations

from pathlib import Path

import pytest
import zmq
from hypothesis import given
from hypothesis import strategies as st

from disagg.errors import StartError
from disagg.security.keys import KeyPair, key_bytes, key_text, load_key, load_or_make_key, make_key, public_half
from disagg.security.state import write_private
from tests.security.users import mode, umask


def refusal(path: Path) -> str:
    with pytest.raises(StartError) as caught:
        load_key(path)
    return str(caught.value)


def test_a_key_is_made_once_and_loaded_ever_after(tmp_path: Path) -> None:
    path = tmp_path / "router" / "key"
    with umask(0):
        made, first = load_or_make_key(path)
    text = path.read_bytes()
    again, second = load_or_make_key(path)
    assert (first, second) == (True, False)
    assert made == again == load_key(path)
    assert (path.read_bytes(), mode(path), mode(path.parent)) == (text, 0o600, 0o700)
    assert zmq.curve_public(made.secret.encode()) == made.public.encode()


def test_every_key_is_another() -> None:
    assert len({make_key().public for _ in range(50)}) == 50


def test_a_key_does_not_show_its_secret() -> None:
    pair = make_key()
    assert pair.secret not in f"{pair} {pair!r} {[pair]}"
    assert pair.public in repr(pair)


def test_a_missing_key_says_how_to_make_one(tmp_path: Path) -> None:
    assert refusal(tmp_path / "key") == f"there is no key at {tmp_path}/key: make one with `disagg keygen`"


def test_a_loose_key_is_refused_and_not_replaced(tmp_path: Path) -> None:
    path = tmp_path / "key"
    made, _ = load_or_make_key(path)
    path.chmod(0o640)
    assert f"can be read by others (mode 0640): chmod 600 {path}" in refusal(path)
    with pytest.raises(StartError):
        load_or_make_key(path)
    path.chmod(0o600)
    assert load_key(path) == made


def test_halves_that_do_not_belong_together_are_refused(tmp_path: Path) -> None:
    one, other = make_key(), make_key()
    write_private(tmp_path / "key", f'public = "{one.public}"\nsecret = "{other.secret}"\n'.encode())
    said = refusal(tmp_path / "key")
    assert said == f"{tmp_path}/key holds a public key that does not belong to its secret: restore it, or remove it to have a new key made"


SECRET = make_key().secret


@pytest.mark.parametrize(
    "text",
    [
        b"",
        b"\xff\xfe",
        b"not toml",
        b"[" * 5000,
        b"a = " + b"[" * 5000,
        f'secret = "{SECRET}"'.encode(),
        f'public = 1\nsecret = "{SECRET}"'.encode(),
        f'public = "{SECRET}"\nsecret = "{SECRET[:-1]}"'.encode(),
        f'public = "{SECRET}"\nsecret = "{SECRET[:-1]}~"'.encode(),
        f'public = "{SECRET}"\nsecret = "{"#" * 40}"'.encode(),
        f'public = "{SECRET}"\nsecret = "{SECRET}'.encode(),
    ],
    ids=[
        "empty",
        "no text",
        "not toml",
        "brackets",
        "brackets as a value",
        "no public half",
        "a public half that is a number",
        "a short secret",
        "a letter that is none",
        "a secret that is none",
        "no end of the string",
    ],
)
def test_a_file_that_holds_no_key_is_one_sentence_without_its_content(text: bytes, tmp_path: Path) -> None:
    write_private(tmp_path / "key", text)
    said = refusal(tmp_path / "key")
    assert said == f"{tmp_path}/key holds no key: restore it from a backup, or remove it to have a new key made"
    with pytest.raises(StartError, match="holds no key"):
        load_or_make_key(tmp_path / "key")
    assert (tmp_path / "key").read_bytes() == text


@given(st.one_of(st.text(max_size=60), st.text(min_size=40, max_size=40), st.text("0aZ./#~\0é", min_size=40, max_size=40)))
def test_any_text_is_a_key_or_none_and_never_two_texts_one_key(text: str) -> None:
    raw = key_bytes(text)
    if raw is not None:
        assert len(raw) == 32
        assert key_text(raw) == text


@given(st.binary(min_size=32, max_size=32))
def test_any_32_bytes_are_a_key(raw: bytes) -> None:
    assert key_bytes(key_text(raw)) == raw
    assert key_bytes(public_half(key_text(raw))) is not None


def test_key_pairs_compare_by_both_halves() -> None:
    pair = make_key()
    assert pair == KeyPair(pair.public, pair.secret)
    assert pair != KeyPair(pair.public, make_key().secret)
