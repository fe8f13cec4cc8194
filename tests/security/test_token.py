"""Join tokens: used once, in time, by whoever holds the secret, and nothing that a peer sends reaches a path."""

from __future__ import annotations

import base64
from pathlib import Path

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from disagg.errors import ConfigError, StartError
from disagg.model import Role
from disagg.security.keys import key_bytes, make_key, public_half
from disagg.security.state import write_private
from disagg.security.token import PREFIX, Grant, Token, TokenStore
from tests.security.test_state import at_once
from tests.security.users import mode, umask

NOW = 1_790_000_000.5
ROUTER = make_key()
BOTH = (Role.PREFILL, Role.DECODE)


@pytest.fixture
def store(tmp_path: Path) -> TokenStore:
    return TokenStore(tmp_path / "router" / "tokens")


def files(tmp_path: Path) -> list[Path]:
    return sorted((tmp_path / "router" / "tokens").iterdir())


def make(store: TokenStore, *roles: Role, ttl_s: int = 900) -> Token:
    return store.create(roles or (Role.PREFILL,), ttl_s, now_wall=NOW, router_key=ROUTER.public)


# --- the word


def test_a_token_is_one_plain_word_and_comes_back_whole(store: TokenStore) -> None:
    token = make(store, *BOTH)
    word = token.encode()
    assert word.startswith(PREFIX)
    assert word.replace("-", "").replace("_", "").isalnum()
    assert word.isascii()
    assert len(word) < 160
    for pasted in (word, f"  {word}\n", f"\r\n{word}\t "):
        assert Token.decode(pasted) == token
    assert (token.router_key, token.roles, token.expires_at) == (ROUTER.public, BOTH, 1_790_000_900)
    assert token.public_key == public_half(token.secret_key)


def test_a_token_does_not_show_its_secret(store: TokenStore) -> None:
    token = make(store)
    assert token.secret_key not in f"{token} {token!r} {[token]}"
    assert token.encode() not in repr(token)


def refusal(text: str) -> str:
    with pytest.raises(ConfigError) as caught:
        Token.decode(text)
    assert caught.value.__cause__ is None  # nothing that could carry it into a log
    assert caught.value.__context__ is None
    return str(caught.value)


def packed(*fields: object) -> str:
    return PREFIX + base64.urlsafe_b64encode(msgspec.msgpack.encode(fields)).decode().rstrip("=")


KEY = bytes(range(32))


@pytest.mark.parametrize(
    "text",
    [
        PREFIX,
        PREFIX + "A",
        PREFIX + "====",
        PREFIX + "a b",
        PREFIX + "é",
        PREFIX + "\udcff",
        PREFIX + "A" * 100_000,
        PREFIX + base64.urlsafe_b64encode(b"\x91" * 380).decode().rstrip("="),
        packed(),
        packed(KEY, KEY, ["prefill"]),
        packed(KEY, KEY, [], 1),
        packed(KEY, KEY, ["king"], 1),
        packed(KEY, KEY, "prefill", 1),
        packed(KEY, KEY, ["prefill"], -1),
        packed(KEY, KEY, ["prefill"], "1"),
        packed(KEY, KEY[:31], ["prefill"], 1),
        packed(KEY + b"x", KEY, ["prefill"], 1),
        PREFIX + base64.urlsafe_b64encode(b"\x94\xc4\x20" + KEY + b"\xc4\x20" + KEY + b"\x91\xa1\xff\x01").decode().rstrip("="),
        packed("k" * 32, KEY, ["prefill"], 1),
    ],
)
def test_a_damaged_token_is_one_sentence(text: str) -> None:
    assert refusal(text) == "the join token is damaged or not complete: copy all of it, or make another with `disagg token create`"


def test_what_a_later_version_adds_is_passed_over() -> None:
    assert Token.decode(packed(KEY, KEY, ["prefill"], 1, "more")).roles == (Role.PREFILL,)
    nested = packed(KEY, KEY, ["prefill"], 1).removeprefix(PREFIX)
    raw = b"\x95" + base64.urlsafe_b64decode(nested + "=" * (-len(nested) % 4))[1:] + b"\x91" * 250 + b"\x00"
    assert Token.decode(PREFIX + base64.urlsafe_b64encode(raw).decode().rstrip("=")).expires_at == 1


@pytest.mark.parametrize("text", ["", " ", "hello", "dgt2_abc", "DGT1_abc", "--token", "\0"])
def test_what_is_no_token_says_where_to_get_one(text: str) -> None:
    assert refusal(text) == "this is no join token, which begins with dgt1_: make one with `disagg token create`"


@given(st.one_of(st.text(), st.text().map(PREFIX.__add__), st.binary().map(lambda b: PREFIX + base64.urlsafe_b64encode(b).decode())))
def test_garbage_is_refused_without_repeating_it(text: str) -> None:
    said = refusal(text)
    assert len(said) < 150
    assert text.removeprefix(PREFIX) not in said or len(text.removeprefix(PREFIX)) < 8


@given(st.data())
def test_a_token_with_wrong_characters_is_refused_or_still_a_token(data: st.DataObject) -> None:
    word = Token(ROUTER.public, ROUTER.secret, BOTH, 1_790_000_900).encode()
    at = data.draw(st.integers(0, len(word) - 1))
    changed = word[:at] + data.draw(st.text(max_size=3)) + word[at + data.draw(st.integers(0, 3)) :]
    try:
        token = Token.decode(changed)
    except ConfigError as error:
        assert ROUTER.secret not in str(error)  # noqa: PT017  # either outcome is right
    else:
        assert key_bytes(token.router_key) is not None
        assert key_bytes(token.public_key) is not None
        assert set(token.roles) <= set(Role)


# --- the store


def test_the_store_holds_the_public_half_only(store: TokenStore, tmp_path: Path) -> None:
    with umask(0):
        token = make(store, *BOTH)
    (file,) = files(tmp_path)
    raw = key_bytes(token.public_key)
    assert raw is not None
    assert file.name == raw.hex()
    assert (mode(file), mode(file.parent)) == (0o600, 0o700)
    secret = key_bytes(token.secret_key)
    assert secret is not None
    assert token.secret_key.encode() not in file.read_bytes()
    assert secret.hex() not in file.name


def test_a_grant_is_found_until_it_expires_and_then_gone(store: TokenStore, tmp_path: Path) -> None:
    token = make(store, *BOTH)
    grant = Grant(token.public_key, BOTH, 1_790_000_900)
    assert store.find(token.public_key, now_wall=NOW) == grant
    assert store.find(token.public_key, now_wall=1_790_000_899.9) == grant
    assert store.find(token.public_key, now_wall=1_790_000_900) is None
    assert files(tmp_path) == []
    assert not store.spend(token.public_key)


def test_a_token_is_spent_once(store: TokenStore) -> None:
    token, other = make(store), make(store)
    assert store.spend(token.public_key)
    assert not store.spend(token.public_key)
    assert store.find(token.public_key, now_wall=NOW) is None
    assert store.find(other.public_key, now_wall=NOW) is not None


def test_of_racing_exchanges_one_wins(store: TokenStore, tmp_path: Path) -> None:
    for _ in range(50):
        public = make(store).public_key
        racers = [TokenStore(tmp_path / "router" / "tokens") for _ in range(6)]
        assert at_once(6, lambda n, public=public, racers=racers: racers[n].spend(public)).count(True) == 1  # type: ignore[misc]


def test_a_role_asked_for_twice_counts_once(store: TokenStore) -> None:
    assert make(store, Role.DECODE, Role.DECODE).roles == (Role.DECODE,)


def test_a_key_of_nobody_is_not_found(store: TokenStore) -> None:
    assert store.find(make_key().public, now_wall=NOW) is None  # before there is a folder
    assert not store.spend(make_key().public)
    assert store.sweep(NOW) == 0
    make(store)
    assert store.find(make_key().public, now_wall=NOW) is None


def test_sweep_removes_what_expired_and_nothing_else(store: TokenStore, tmp_path: Path) -> None:
    make(store, ttl_s=10)
    make(store, ttl_s=20)
    kept = make(store, ttl_s=30)
    folder = tmp_path / "router" / "tokens"
    write_private(folder / "note.txt", b'{"roles":["prefill"],"expires_at":1}')
    write_private(folder / ("0" * 64), b"broken")
    write_private(folder / ("1" * 64), b'{"roles":["prefill"],"expires_at":1}')
    (folder / ("1" * 64)).chmod(0o644)
    assert store.sweep(NOW + 20) == 2
    assert [f.name[:8] for f in files(tmp_path) if f.name[:8] in {"note.txt", "00000000", "11111111"}] == [
        "00000000",
        "11111111",
        "note.txt",
    ]
    assert len(files(tmp_path)) == 4
    assert store.find(kept.public_key, now_wall=NOW + 20) is not None


@pytest.mark.parametrize(
    "text",
    [
        b"",
        b"{}",
        b'{"roles":[],"expires_at":9999999999}',
        b'{"roles":["king"],"expires_at":9999999999}',
        b"[" * 5000,
        b'{"roles":["\xff"]}',
        b'{"x":' + b"[" * 5000,
    ],
)
def test_a_broken_file_grants_nothing_and_names_itself(text: bytes, store: TokenStore, tmp_path: Path) -> None:
    token = make(store)
    (file,) = files(tmp_path)
    write_private(file, text)
    with pytest.raises(StartError, match=file.name):
        store.find(token.public_key, now_wall=NOW)


def test_a_file_that_others_can_write_grants_nothing(store: TokenStore, tmp_path: Path) -> None:
    token = make(store)
    files(tmp_path)[0].chmod(0o620)
    with pytest.raises(StartError, match="can be written by others"):
        store.find(token.public_key, now_wall=NOW)


TRAVERSALS = [
    "",
    ".",
    "..",
    "../key",
    "../../outside",
    "/etc/passwd",
    "key\0",
    "./" * 20,
    ("../" * 14)[:40],
    "/" * 40,
    "." * 40,
    "0" * 64,
    "é" * 40,
    "\0" * 40,
    "../" * 11 + "outside",
]


@pytest.mark.parametrize("text", TRAVERSALS)
def test_no_text_of_a_peer_names_a_path(text: str, store: TokenStore, tmp_path: Path) -> None:
    make(store)
    grant = b'{"roles":["prefill"],"expires_at":9999999999}'
    baits = [tmp_path / "outside", tmp_path / "router" / "key", tmp_path / "router" / "tokens" / ("0" * 64)]
    for bait in baits:
        write_private(bait, grant)
    assert store.find(text, now_wall=NOW) is None
    assert not store.spend(text)
    assert [bait.read_bytes() for bait in baits] == [grant] * 3
    assert len(files(tmp_path)) == 2


@given(text=st.one_of(st.text(), st.text("./0aZ", min_size=40, max_size=40)))
def test_any_text_of_a_peer_is_a_stranger(text: str, tmp_path_factory: pytest.TempPathFactory) -> None:
    folder = tmp_path_factory.getbasetemp() / "any-text"
    store = TokenStore(folder)
    assert store.find(text, now_wall=NOW) is None
    assert not store.spend(text)
    assert not folder.exists()
