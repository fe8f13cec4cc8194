"""The units: what they promise, and what systemd's own tools say of them."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import urllib.request
from ctypes.util import find_library
from pathlib import Path

import pytest

import disagg
from disagg.activation import NAME
from disagg.deploy.systemd import HOMES, POLKIT_FILE, SYSUSERS_FILE, UNIT_DIR, Site, unit_files
from disagg.errors import ConfigError
from tests.deploy.units import HOSTS, LIMIT_S, TRUE, analyze, exposure, needs_systemd, write_units
from tests.ports import free_port

HERE = Path(__file__).parent
AGENTS = HOSTS[1:]
SOCKET = f"{UNIT_DIR}/disagg-router.socket"
ENGINE = f"{UNIT_DIR}/disagg-engine@.service"


def settings_of(text: str) -> dict[str, list[str]]:
    found: dict[str, list[str]] = {}
    for line in text.splitlines():
        key, is_setting, value = line.partition("=")
        if is_setting and not line.startswith("#"):
            found.setdefault(key, []).append(value)
    return found


def unit(role: str, site: Site | None = None, *, engine: bool = False) -> dict[str, list[str]]:
    files = unit_files(role, site or Site("/opt/disagg/bin/disagg"))
    return settings_of(files[ENGINE] if engine else next(iter(files.values())))


# --- what systemd says


@needs_systemd
def test_systemd_understands_every_line(tmp_path: Path) -> None:
    units = write_units(tmp_path)
    assert len(units) == 6
    for path in units.values():
        result = analyze("verify", str(path))
        assert (result.returncode, result.stdout, result.stderr) == (0, "", "")


@needs_systemd
def test_that_check_would_notice_a_word_that_systemd_does_not_know(tmp_path: Path) -> None:
    path = write_units(tmp_path)["disagg-router.service"]
    path.write_text(path.read_text().replace("RestartSec=", "RestartSecond="))
    assert "RestartSecond" in analyze("verify", str(path)).stderr


@needs_systemd
@pytest.mark.parametrize("site", [Site(TRUE), Site("/home/me/disagg/.venv/bin/disagg")], ids=["in the system", "in a home"])
def test_exposure(site: Site, tmp_path: Path) -> None:
    found = {name: exposure(path) for name, path in write_units(tmp_path, site).items() if name.endswith(".service")}
    assert found.pop("disagg-router.service") <= 1.5
    assert all(value <= 2.5 for value in found.values()), found


@needs_systemd
@pytest.mark.parametrize("path", ["/opt/my programs/disagg", "/opt/a+b@c/disagg", "/opt/100%/disagg", "/opt/$HOME/disagg"])
def test_any_path_of_the_program_arrives_as_it_is(path: str, tmp_path: Path) -> None:
    complaint = analyze("verify", str(write_units(tmp_path, Site(path))["disagg-router.service"])).stderr
    assert f"Command {path} is not executable: No such file or directory" in complaint


@pytest.mark.skipif(not find_library("seccomp"), reason="libseccomp is not installed")
@needs_systemd
@pytest.mark.parametrize("name", ["disagg-router.service", "disagg-prefill.service"])
def test_zeromq_with_curve_works_under_the_system_call_rules(name: str, tmp_path: Path) -> None:
    code = (
        "import asyncio, ctypes, mmap, uvloop, zmq, zmq.asyncio\n"
        "try: mmap.mmap(-1, 4096, prot=7)\n"
        "except PermissionError: print('confined')\n"
        "async def main():\n"
        "    with zmq.asyncio.Context() as context, context.socket(zmq.ROUTER) as a, context.socket(zmq.DEALER) as b:\n"
        "        public, secret = zmq.curve_keypair(); a.curve_server, a.curve_publickey, a.curve_secretkey = True, public, secret\n"
        "        b.curve_serverkey = public; b.curve_publickey, b.curve_secretkey = zmq.curve_keypair()\n"
        "        port = a.bind_to_random_port('tcp://127.0.0.1'); b.connect(f'tcp://127.0.0.1:{port}')\n"
        "        await b.send(b'hello'); print((await a.recv_multipart())[1].decode())\n"
        "print(ctypes.CFUNCTYPE(ctypes.c_int)(lambda: 3)())\n"
        "asyncio.Runner(loop_factory=uvloop.new_event_loop).run(main())\n"
    )
    command = [sys.executable, str(HERE / "confine.py"), str(write_units(tmp_path)[name]), sys.executable, "-c", code]
    result = subprocess.run(command, capture_output=True, text=True, timeout=LIMIT_S, check=False)
    assert (result.returncode, result.stdout.split()) == (0, ["confined", "3", "hello"]), result


@pytest.mark.skipif(not find_library("seccomp"), reason="libseccomp is not installed")
@needs_systemd
def test_a_router_serves_and_ends_under_the_system_call_rules(tmp_path: Path) -> None:
    port = free_port()
    command = [sys.executable, str(HERE / "confine.py"), str(write_units(tmp_path)["disagg-router.service"])]
    command += [sys.executable, "-m", "disagg", "serve", "--role", "router", "--http", f"127.0.0.1:{port}"]
    command += ["--admin", f"127.0.0.1:{free_port()}"]
    with subprocess.Popen(command, cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as process:
        try:
            assert process.stdout is not None
            said = next((line for line in process.stdout if line.startswith("Started in ")), "")
            assert said
            with urllib.request.urlopen(f"http://127.0.0.1:{port}/healthz", timeout=LIMIT_S) as answer:
                assert answer.status == 200
            process.terminate()
            assert process.wait(LIMIT_S) == 0
        finally:
            process.kill()


POLKITD = Path("/usr/lib/polkit-1/polkitd")


@pytest.mark.skipif(
    os.geteuid() != 0 or not POLKITD.exists() or not all(map(shutil.which, ("pkcheck", "dbus-daemon", "unshare", "setpriv"))),
    reason="needs root, polkitd, pkcheck, dbus-daemon, unshare and setpriv",
)
def test_polkit_lets_the_agent_start_its_engines_and_nothing_else(tmp_path: Path) -> None:
    """The real polkitd on a bus of its own, in a mount namespace where /etc/polkit-1/rules.d holds our file alone."""
    rules = tmp_path / "50-disagg.rules"
    rules.write_text(unit_files("decode", Site(TRUE, user="nobody"))[POLKIT_FILE])
    command = ["unshare", "--mount", "--pid", "--fork", "--kill-child", "--mount-proc", "bash", str(HERE / "ask_polkit"), str(rules)]
    result = subprocess.run(command, capture_output=True, text=True, timeout=LIMIT_S, check=False)
    if result.returncode == 77:
        pytest.skip(f"polkitd cannot run here: {result.stdout}")
    answers = [line for line in result.stdout.splitlines() if line.startswith(("yes ", "no "))]
    assert answers == [
        "yes nobody disagg-engine@prefill-0.service start",
        "yes nobody disagg-engine@prefill-0.service stop",
        "yes nobody disagg-engine@a.b_c.service restart",
        "no nobody disagg-engine@prefill-0.service set-property",
        "no nobody ssh.service start",
        "no nobody xdisagg-engine@prefill-0.service start",
        "no nobody disagg-engine@prefill-0.service.d start",
        "no nobody disagg-engine@../../x.service start",
        "no daemon disagg-engine@prefill-0.service start",
    ], result


# --- what the units promise


@pytest.mark.parametrize("role", AGENTS)
def test_an_engine_outlives_the_restart_of_its_agent(role: str) -> None:
    engine, agent = unit(role, engine=True), unit(role)
    tied = {"PartOf", "BindsTo", "Requires", "Requisite", "PropagatesStopTo", "StopPropagatedFrom", "Upholds", "Conflicts"}
    assert not tied & engine.keys()
    assert not tied & agent.keys()
    assert not any("disagg" in value for key in ("After", "Wants") for value in engine[key])  # nor waits for it
    assert "disagg-engine" not in str(agent)
    assert engine["Restart"] == ["no"]  # the agent restarts it, with back-off
    assert engine["KillMode"] == ["control-group"]


@pytest.mark.parametrize("role", AGENTS)
def test_at_a_shutdown_the_agent_goes_before_its_engines(role: str) -> None:
    assert f"disagg-{role}.service" in unit(role, engine=True)["Before"][0].split()


@pytest.mark.parametrize("role", HOSTS)
def test_the_service_notifies_is_watched_and_comes_back(role: str) -> None:
    service = unit(role)
    expected = {"Type": "notify", "NotifyAccess": "main", "WatchdogSec": "10s", "Restart": "always", "StartLimitIntervalSec": "0"}
    assert {key: service[key] for key in expected} == {key: [value] for key, value in expected.items()}
    assert service["RestartPreventExitStatus"] == ["2 78"]


def test_the_routers_socket_starts_its_service_and_is_called_what_the_router_looks_for() -> None:
    found = settings_of(unit_files("router", Site("/opt/disagg"))[SOCKET])
    assert found["FileDescriptorName"] == [NAME]
    assert found["ListenStream"] == ["127.0.0.1:8000"]
    assert found["WantedBy"] == ["sockets.target"]
    assert not {"Accept", "ReusePort", "Service"} & found.keys()  # one process, the one of the same name


@needs_systemd
@pytest.mark.parametrize(
    ("http", "stream"),
    [("0.0.0.0:80", "0.0.0.0:80"), ("localhost:8000", "127.0.0.1:8000"), ("[::]:8000", "[::]:8000")],
)
def test_the_address_of_the_config_stands_in_the_socket_unit(http: str, stream: str, tmp_path: Path) -> None:
    path = write_units(tmp_path, Site(TRUE, http=http))["disagg-router.socket"]
    assert settings_of(path.read_text())["ListenStream"] == [stream]
    assert (analyze("verify", str(path)).returncode, analyze("verify", str(path)).stderr) == (0, "")


@pytest.mark.parametrize(("http", "what"), [("router.example:8000", "write an address"), ("127.0.0.1:0", "write the port")])
def test_an_address_that_systemd_cannot_listen_on_is_refused(http: str, what: str) -> None:
    with pytest.raises(ConfigError, match=what):
        unit_files("router", Site("/opt/disagg", http=http))


@pytest.mark.parametrize("role", AGENTS)
def test_nobody_waits_for_a_word_of_a_real_engine(role: str) -> None:
    engine = unit(role, engine=True)
    assert engine["Type"] == ["exec"]
    assert not {"WatchdogSec", "NotifyAccess", "MemoryDenyWriteExecute", "PrivateDevices"} & engine.keys()
    assert engine["LimitMEMLOCK"] == ["infinity"]
    assert engine["ExecStart"] == ["/opt/disagg/bin/disagg engine run %i"]


@pytest.mark.parametrize("role", AGENTS)
def test_agent_and_engines_see_each_other(role: str) -> None:
    """One user, no user namespace: else /proc/PID of an engine is invisible to its agent."""
    agent, engine = unit(role), unit(role, engine=True)
    assert agent["User"] == engine["User"] == ["disagg"]
    assert not {"PrivateUsers", "ProcSubset"} & (agent.keys() | engine.keys())
    assert agent["StateDirectory"] == engine["StateDirectory"] == ["disagg"]


@pytest.mark.parametrize("role", AGENTS)
def test_the_token_reaches_the_agent_alone_and_may_be_missing(role: str) -> None:
    agent = unit(role)
    assert "disagg-token:/etc/disagg/token" in agent["LoadCredential"]
    assert r"disagg-token:\n" in agent["SetCredential"]  # what systemd.exec(5) documents for a file that is not there
    assert " --token-file %d/disagg-token" in agent["ExecStart"][0]
    assert not any("Credential" in key for key in unit(role, engine=True))
    assert not any("disagg-token" in value for values in unit("router").values() for value in values)


@pytest.mark.parametrize("role", ["router", *AGENTS])
def test_the_key_may_come_as_a_credential(role: str) -> None:
    service = unit(role)
    assert "disagg-key:/etc/disagg/key" in service["LoadCredential"]
    assert r"disagg-key:\n" in service["SetCredential"]
    assert service["ExecStart"][0].endswith(" --key-file %d/disagg-key")


def test_the_command_of_each_role() -> None:
    site = Site("/opt/my programs/disagg", "/etc/disagg/a $b.toml")
    command = '"/opt/my programs/disagg" serve --role router --config "/etc/disagg/a $$b.toml" --key-file %d/disagg-key'
    assert unit("router", site)["ExecStart"] == [command]
    for role in AGENTS:
        assert f" serve --role {role} --config " in unit(role, site)["ExecStart"][0]
        assert " --supervise systemd " in unit(role, site)["ExecStart"][0]


@pytest.mark.parametrize("home", HOMES)
def test_a_disagg_that_lies_in_a_home_is_not_hidden_from_its_unit(home: str) -> None:
    assert unit("router")["ProtectHome"] == ["yes"]
    for site in (
        Site(f"{home}/me/bin/disagg"),
        Site("/opt/disagg", f"{home}/me/disagg.toml"),
        Site("/opt/disagg", reads=(f"{home}/me/python",)),
    ):
        assert unit("router", site)["ProtectHome"] == ["read-only"]
    assert unit("router", Site("/homestead/disagg"))["ProtectHome"] == ["yes"]


@pytest.mark.parametrize("role", HOSTS)
def test_files_of_a_role(role: str) -> None:
    files = unit_files(role, Site("/opt/disagg", user="gpu"))
    others = [SOCKET] if role == "router" else [ENGINE, POLKIT_FILE]
    assert list(files) == [f"{UNIT_DIR}/disagg-{role}.service", *others, SYSUSERS_FILE]
    for path, text in files.items():
        assert f"Made by disagg {disagg.__version__}" in text.splitlines()[0]
        assert re.search(r"\bgpu\b", text) or path == SOCKET
        assert text.endswith("\n")
        assert max(map(len, text.splitlines())) <= 180


@pytest.mark.parametrize("user", ["root", "", "Disagg", "a b", 'x"; evil', "-u", "%i", "x" * 32, "müller"])
def test_a_user_that_cannot_stand_in_a_rule_is_refused(user: str) -> None:
    with pytest.raises(ConfigError, match="--user = "):
        unit_files("prefill", Site("/opt/disagg", user=user))


@pytest.mark.parametrize("path", ["disagg", "", "/opt/a\nUser=root", "/opt/\x00"])
def test_a_path_that_cannot_stand_in_a_unit_is_refused(path: str) -> None:
    with pytest.raises(ConfigError, match="cannot stand in a unit"):
        unit_files("router", Site(path))
    with pytest.raises(ConfigError, match="cannot stand in a unit"):
        unit_files("router", Site("/opt/disagg", path))


@pytest.mark.parametrize("path", ['/opt/a"b', "/opt/a'b", "/opt/a\\b"])
def test_systemd_takes_no_program_with_a_quote_in_its_name(path: str) -> None:
    with pytest.raises(ConfigError, match="cannot stand in a unit"):
        unit_files("router", Site(path))
    assert "--config" in unit("router", Site("/opt/disagg", path))["ExecStart"][0]
