"""Tokens and keys that open nothing: the person at the host reads one sentence, the router goes on."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from disagg.model import Role
from disagg.security.keys import make_key
from disagg.security.token import Token
from tests.hostile.conftest import HostProcess, Scene
from tests.rig.hosts import wait_for, wall

pytestmark = pytest.mark.slow

Start = Callable[..., HostProcess]


@pytest.fixture
def start(scene: Scene, tmp_path: Path) -> Iterator[Start]:
    """Starts hosts; those of one `home` share a state directory."""
    started: list[HostProcess] = []

    def begin(name: str, token: Token | None = None, *, home: str = "host", role: str = "decode") -> HostProcess:
        host = HostProcess(scene.router, tmp_path / home, name, role=role, token=token.encode() if token else "")
        started.append(host)
        return host

    yield begin
    for host in started:
        host.stop()


def joins(scene: Scene, name: str) -> None:
    wait_for(lambda: name in scene.router.online(), 10, f"{name} does not join: {scene.router.hosts()}")


@pytest.mark.parametrize("how", ["expired", "forged", "used"])
def test_a_token_that_is_no_good_ends_the_host_with_one_sentence(scene: Scene, start: Start, how: str) -> None:
    router = scene.router
    token = router.token(Role.DECODE, made_at=wall() - (100 if how == "expired" else 0))
    if how == "forged":
        token = Token(router.key.public, make_key().secret, (Role.DECODE,), int(wall()) + 60)
    if how == "used":
        start("first", token, home="first")
        joins(scene, "first")
    sentence = start("second", token, home="second").sentence()
    assert "refused the token: it has expired, was used before, or belongs to another router" in sentence
    assert "disagg token create" in sentence
    assert token.secret_key not in sentence + router.log.read_text()
    assert "second" not in router.hosts()
    wait_for(lambda: any("unknown_key" in line.fields for line in scene.complaints(0)), 3, "the router says nothing")


def test_a_token_of_another_role_is_refused_and_stays_good_for_its_own(scene: Scene, start: Start) -> None:
    token = scene.router.token(Role.PREFILL)
    sentence = start("host", token).sentence()
    assert "the token is for prefill and not for decode" in sentence
    start("host", token, role="prefill")
    joins(scene, "host")


def test_a_name_that_belongs_to_another_key_is_refused_and_the_token_stays_good(scene: Scene, start: Start) -> None:
    token = scene.router.token(Role.DECODE)
    sentence = start("good", token).sentence()
    assert "'good' is registered with another key" in sentence
    assert "--name" in sentence
    start("free", token, home="free")
    joins(scene, "free")
    wait_for(lambda: any("registration" in line.fields for line in scene.complaints(0)), 3, "the router says nothing")


def test_a_revoked_key_opens_nothing_and_its_host_is_told_at_once(scene: Scene, start: Start) -> None:
    host = start("host", scene.router.token(Role.DECODE))
    joins(scene, "host")
    began = time.monotonic()
    assert scene.router.revoke("host") == 200
    assert "its key was revoked" in host.sentence(limit_s=20)
    assert time.monotonic() - began < 3.0, "the process itself takes a moment to end; test_revoke.py has the bound of a second"
    assert "does not know this host's key" in start("host").sentence()
    assert "host" not in scene.router.hosts()
    start("host", scene.router.token(Role.DECODE))
    joins(scene, "host")


def test_a_host_whose_registration_is_gone_says_what_to_do(scene: Scene, start: Start) -> None:
    host = start("host", scene.router.token(Role.DECODE))
    joins(scene, "host")
    host.stop()
    scene.router.stop()
    (scene.router.root / "router" / "hosts.json").unlink()
    scene.router.start()
    sentence = start("host").sentence()
    assert "it was revoked, or the router lost its state" in sentence
    assert "join again with a new token" in sentence
