"""Who may connect: names and keys belong together, and every change is on the disk."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from disagg.errors import NameTakenError, RequestError, StartError
from disagg.model import Role
from disagg.security.keys import make_key
from disagg.security.registry import Registration, Registry
from disagg.security.state import write_private
from tests.security.users import mode


def host(name: str, *, key: str = "", roles: tuple[Role, ...] = (Role.PREFILL,), at: float = 1_790_000_000.25) -> Registration:
    return Registration(name, key or make_key().public, roles, at)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "router" / "hosts.json"


def test_what_is_registered_is_there_after_a_restart(path: Path) -> None:
    registry = Registry(path)
    assert registry.all() == ()
    b, a = host("b", roles=(Role.PREFILL, Role.DECODE)), host("a")
    registry.register(b)
    registry.register(a)
    assert mode(path) == 0o600
    for seen in (registry, Registry(path)):
        assert seen.all() == (a, b)
        assert (seen.by_name("a"), seen.by_key(a.public_key)) == (a, a)
        assert (seen.by_name("c"), seen.by_key("c"), seen.by_key(make_key().public)) == (None, None, None)


def test_a_revoked_host_is_out_at_once_and_after_a_restart(path: Path) -> None:
    registry = Registry(path)
    a, b = host("a"), host("b")
    registry.register(a)
    registry.register(b)
    assert registry.revoke("a") == a
    assert registry.revoke("a") is None
    for seen in (registry, Registry(path)):
        assert (seen.by_name("a"), seen.by_key(a.public_key), seen.all()) == (None, None, (b,))
    registry.register(host("a"))  # the name is free again


def test_a_name_belongs_to_its_key(path: Path) -> None:
    registry = Registry(path)
    a = host("a")
    registry.register(a)
    with pytest.raises(NameTakenError) as caught:
        registry.register(host("a"))
    assert str(caught.value) == "a host 'a' is registered with another key: `disagg hosts revoke a` first, or choose another --name"
    assert caught.value.status == 409
    assert Registry(path).all() == registry.all() == (a,)


def test_a_key_belongs_to_its_name(path: Path) -> None:
    registry = Registry(path)
    a = host("a")
    registry.register(a)
    with pytest.raises(NameTakenError, match="registered as 'a'"):
        registry.register(host("b", key=a.public_key))
    assert Registry(path).all() == registry.all() == (a,)


def test_the_same_host_again_gets_its_new_roles(path: Path) -> None:
    registry = Registry(path)
    a = host("a")
    registry.register(a)
    again = host("a", key=a.public_key, roles=(Role.DECODE,), at=2.0)
    registry.register(again)
    assert Registry(path).all() == registry.all() == (again,)


@pytest.mark.parametrize("wrong", [host("../a"), host(""), host("a\nb"), host("a" * 64), host("a", key="short"), host("a", key="\0" * 40)])
def test_nonsense_of_a_peer_is_not_stored(wrong: Registration, path: Path) -> None:
    with pytest.raises(RequestError):
        Registry(path).register(wrong)
    assert not path.exists()


KEY = make_key().public
ENTRY = f'{{"name":"a","public_key":"{KEY}","roles":["prefill"],"registered_at_wall":1.0}}'


@pytest.mark.parametrize(
    "text",
    [
        "",
        "[]",
        '{"hosts":[{"name":"a"}]}',
        f'{{"hosts":[{ENTRY.replace("prefill", "king")}]}}',
        f'{{"hosts":[{ENTRY.replace(KEY, "short")}]}}',
        f'{{"hosts":[{ENTRY.replace(chr(34) + "a" + chr(34), chr(34) + "../a" + chr(34))}]}}',
        f'{{"hosts":[{ENTRY},{ENTRY.replace(KEY, make_key().public)}]}}',
        f'{{"hosts":[{ENTRY},{ENTRY.replace(chr(34) + "a" + chr(34), chr(34) + "b" + chr(34))}]}}',
        '{"hosts":' + "[" * 5000,
        '{"more":' + "[" * 5000,
    ],
)
def test_a_broken_file_names_itself_and_stays(text: str, path: Path) -> None:
    write_private(path, text.encode())
    with pytest.raises(StartError) as caught:
        Registry(path)
    assert str(caught.value).startswith(f"{path} is broken (")
    assert "\n" not in str(caught.value)
    assert path.read_bytes() == text.encode()


def test_fields_of_a_later_version_are_passed_over(path: Path) -> None:
    write_private(path, f'{{"hosts":[{ENTRY[:-1]},"more":1}}],"more":2}}'.encode())
    assert [r.name for r in Registry(path).all()] == ["a"]


def test_a_file_that_others_can_write_is_refused(path: Path) -> None:
    Registry(path).register(host("a"))
    path.chmod(0o660)
    with pytest.raises(StartError, match="chmod 600"):
        Registry(path)


def lose_folder(path: Path) -> None:
    """No file can be written from here on, by root neither."""
    shutil.rmtree(path.parent)
    path.parent.write_bytes(b"")


def test_a_registration_that_cannot_be_stored_does_not_count(path: Path) -> None:
    registry = Registry(path)
    a = host("a")
    registry.register(a)
    lose_folder(path)
    with pytest.raises(StartError):
        registry.register(host("b"))
    assert registry.all() == (a,)


def test_a_revocation_that_cannot_be_stored_counts_and_can_be_said_again(path: Path) -> None:
    registry = Registry(path)
    a, b = host("a"), host("b")
    registry.register(a)
    registry.register(b)
    lose_folder(path)
    for _ in range(2):
        with pytest.raises(StartError):
            registry.revoke("a")
        assert registry.by_key(a.public_key) is None
    path.parent.unlink()
    assert registry.revoke("a") is None
    assert Registry(path).all() == (b,)
