"""Settings become launches: what is found on this host, which ports an engine gets, and the sentence when something is missing."""

from __future__ import annotations

import contextlib
import importlib.util
import os
import shutil
import socket
import stat
import sys
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from disagg import launches as module
from disagg.config import Config, EngineSection
from disagg.engines.base import EngineLaunch
from disagg.errors import ConfigError, StartError
from disagg.launches import (
    DEMO_MODEL,
    FIRST_PORT,
    PORTS,
    SOCKET_PATH_LIMIT,
    EngineSpec,
    Launches,
    find_backend,
    find_device,
    find_python,
    model_of,
    read_version,
)
from disagg.model import EngineId, Role

HERE = "127.1.2.3"
"""A loopback address of this file's own: nothing else on the machine binds there."""


def spec(name: str = "a", role: Role = Role.PREFILL, **more: Any) -> EngineSpec:
    return EngineSpec(EngineId(name), role, **more)


def program(path: Path, says: str = "0.5.23") -> Path:
    """A Python of which only the version of its SGLang matters."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"#!/bin/sh\necho {says}\n")
    path.chmod(0o755)
    return path


def made(folder: Path, *, is_child: bool = False, at: str = HERE, **engine: Any) -> Launches:
    settings = {"engine": "sglang", "device": "cpu", "sglang_python": str(program(folder / "sglang" / "bin" / "python"))} | engine
    return Launches(Config(engine=EngineSection(**settings)), at, folder / "engines", is_child=is_child)


def ports(launch: EngineLaunch) -> tuple[int, int]:
    return int(launch.url.rpartition(":")[2]), launch.bootstrap_port


def sentence(kind: type[Exception], call: Any, *arguments: Any) -> str:
    with pytest.raises(kind) as caught:
        call(*arguments)
    said = str(caught.value)
    assert said.isprintable(), f"not one line: {said!r}"
    return said


@contextlib.contextmanager
def taken(port: int, at: str = HERE) -> Iterator[int]:
    with socket.socket() as listener:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind((at, port))
        listener.listen()
        yield listener.getsockname()[1]


# --- what this host has


@pytest.mark.parametrize("device", ["nvidia0", "nvidia11", "kfd", "davinci3", "accel/accel0"])
def test_an_accelerator_leaves_the_choice_to_sglang(tmp_path: Path, device: str) -> None:
    path = tmp_path / device
    path.parent.mkdir(exist_ok=True)
    path.touch()
    assert find_device("auto", tmp_path) == ""


@pytest.mark.parametrize("device", ["nvidiactl", "nvidia-uvm", "dri/card0", "accel/other", "null"])
def test_what_is_no_accelerator_means_a_cpu(tmp_path: Path, device: str) -> None:
    path = tmp_path / device
    path.parent.mkdir(exist_ok=True)
    path.touch()
    assert find_device("auto", tmp_path) == "cpu"


def test_a_device_that_is_given_is_taken(tmp_path: Path) -> None:
    (tmp_path / "nvidia0").touch()
    assert [find_device(name, tmp_path) for name in ("cpu", "xpu")] == ["cpu", "xpu"]


def test_kv_travels_by_rdma_only_where_a_device_for_it_is(tmp_path: Path) -> None:
    infiniband = tmp_path / "infiniband"
    assert find_backend("auto", infiniband) == "mooncake-tcp"
    infiniband.mkdir()
    assert find_backend("auto", infiniband) == "mooncake-tcp"
    (infiniband / "mlx5_0").mkdir()
    assert find_backend("auto", infiniband) == "mooncake"
    assert find_backend("nixl", infiniband) == "nixl"
    assert find_backend("mooncake-tcp", infiniband) == "mooncake-tcp"


# --- which Python


@pytest.fixture
def without_sglang(monkeypatch: pytest.MonkeyPatch) -> None:
    """disagg's own Python has none, whatever is installed here."""
    real = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *rest: None if name == "sglang" else real(name, *rest))


def cpu_build(folder: Path, *, done: bool = True) -> Path:
    python = program(folder / "bin" / "python")
    (folder / "disagg-shim").mkdir()
    if done:
        (folder / ".disagg").touch()
    return python


def test_python_as_it_is_given(tmp_path: Path) -> None:
    python = program(tmp_path / "bin" / "python")
    other = program(tmp_path / "other")
    assert find_python(str(python), "", {"DISAGG_SGLANG_PYTHON": str(other)}) == (python, None)


def test_python_as_the_environment_says(tmp_path: Path) -> None:
    """That of an image with SGLang; also by its name alone."""
    python = program(tmp_path / "bin" / "python-of-the-image")
    assert find_python("", "", {"DISAGG_SGLANG_PYTHON": str(python)}) == (python, None)
    environ = {"DISAGG_SGLANG_PYTHON": python.name, "PATH": str(python.parent)}
    assert find_python("", "", environ) == (python, None)
    assert find_python(python.name, "", {"PATH": str(python.parent)}) == (python, None)


def test_disaggs_own_python_comes_next(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "sglang").mkdir()
    (tmp_path / "sglang" / "__init__.py").touch()
    monkeypatch.syspath_prepend(tmp_path)
    cpu = cpu_build(tmp_path / "cpu")
    environ = {"DISAGG_SGLANG_CPU": str(cpu.parent.parent), "DISAGG_SGLANG_PYTHON": ""}
    assert find_python("", "cpu", environ) == (Path(sys.executable), None)


@pytest.mark.usefixtures("without_sglang")
def test_on_a_cpu_the_build_for_it_comes_last(tmp_path: Path) -> None:
    cache = tmp_path / "disagg"
    cpu_build(cache / "sglang-cpu-0.5.22")
    newest = cpu_build(cache / "sglang-cpu-0.5.23")
    cpu_build(cache / "sglang-cpu-0.5.24", done=False)  # it is being made, or its making was cut short
    environ = {"XDG_CACHE_HOME": str(tmp_path)}
    assert find_python("", "cpu", environ) == (newest, newest.parent.parent / "disagg-shim")
    named = cpu_build(tmp_path / "named")
    assert find_python("", "cpu", environ | {"DISAGG_SGLANG_CPU": str(tmp_path / "named")})[0] == named


@pytest.mark.usefixtures("without_sglang")
def test_the_build_for_a_cpu_is_nothing_for_a_gpu(tmp_path: Path) -> None:
    cpu_build(tmp_path / "disagg" / "sglang-cpu-0.5.23")
    environ = {"XDG_CACHE_HOME": str(tmp_path)}
    assert "install it as docs/gpu.md says" in sentence(StartError, find_python, "", "", environ)


def test_the_shim_comes_only_with_a_cpu(tmp_path: Path) -> None:
    python = cpu_build(tmp_path / "cpu")
    assert find_python(str(python), "", {})[1] is None
    assert find_python(str(python), "cpu", {})[1] == tmp_path / "cpu" / "disagg-shim"


@pytest.mark.parametrize("what", ["nothing", "folder", "text"])
def test_what_is_no_program_is_no_python(tmp_path: Path, what: str) -> None:
    path = tmp_path / "python"
    if what == "folder":  # of the environment, say, in place of its bin/python
        path.mkdir()
    if what == "text":
        path.touch(mode=0o644)
    said = "is not a program: give the path of the Python in which SGLang is installed"
    assert sentence(StartError, find_python, str(path), "", {}) == f"engine.sglang_python = {str(path)!r} {said}"
    environ = {"DISAGG_SGLANG_PYTHON": str(path)}
    assert sentence(StartError, find_python, "", "", environ) == f"DISAGG_SGLANG_PYTHON = {str(path)!r} {said}"


@pytest.mark.usefixtures("without_sglang")
def test_no_python_has_it(tmp_path: Path) -> None:
    said = sentence(StartError, find_python, "", "cpu", {"XDG_CACHE_HOME": str(tmp_path)})
    assert said == (
        f"SGLang is not installed in {sys.executable}: run scripts/install-sglang-cpu, which makes it for a CPU,"
        " or set engine.sglang_python to the Python that has it"
    )


# --- which release


def test_a_real_interpreter_says_its_release(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    info = tmp_path / "sglang-0.5.23.post1.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: sglang\nVersion: 0.5.23.post1\n")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    assert read_version(Path(sys.executable)) == "0.5.23.post1"


@pytest.mark.skipif(importlib.util.find_spec("sglang") is not None, reason="this Python has SGLang")
def test_a_real_interpreter_without_sglang_says_so() -> None:
    said = sentence(StartError, read_version, Path(sys.executable))
    assert said == (
        f"SGLang is not installed for {sys.executable}: install it there, or set engine.sglang_python to the Python that has it"
    )


def test_a_program_that_is_no_python_says_so(tmp_path: Path) -> None:
    broken = tmp_path / "python"
    broken.write_text("no program at all")
    broken.chmod(0o755)
    assert sentence(StartError, read_version, broken).startswith(f"{broken} cannot be asked for its SGLang: ")
    assert "No such file" in sentence(StartError, read_version, tmp_path / "gone")


def test_the_release_is_asked_for_once(tmp_path: Path) -> None:
    here = made(tmp_path)
    here.of(spec(), Role.PREFILL)
    program(tmp_path / "sglang" / "bin" / "python", "0.5.1")
    here.of(spec(), Role.PREFILL)
    assert "0.5.1 is too old" in sentence(
        ConfigError, made(tmp_path, sglang_python=str(program(tmp_path / "p", "0.5.1"))).of, spec(), "prefill"
    )


# --- ports


def test_siblings_and_starts_get_other_ports(tmp_path: Path) -> None:
    here = made(tmp_path)
    names = ("a", "b", "c")
    now = {name: ports(here.of(spec(name), Role.PREFILL)) for name in names}
    for _ in range(5):
        for name in names:
            before, now[name] = now[name], ports(here.of(spec(name), Role.PREFILL))
            assert not set(before) & set(now[name])  # the last ones may be what it died of
            every = [port for pair in now.values() for port in pair]
            assert len(set(every)) == 2 * len(names)
            assert all(FIRST_PORT <= port < FIRST_PORT + PORTS for port in every)


def test_ports_never_collide_however_few_there_are(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "PORTS", 6)
    here = made(tmp_path)
    now: dict[str, tuple[int, int]] = {}
    for _ in range(8):
        for name in ("a", "b", "c"):
            now[name] = ports(here.of(spec(name), Role.PREFILL))
            every = [port for pair in now.values() for port in pair]
            assert len(set(every)) == len(every)
    said = sentence(StartError, here.of, spec("d"), Role.PREFILL)
    assert said == f"the engine d cannot be started: no port from {FIRST_PORT} on is free at {HERE}"


def test_a_port_that_somebody_has_is_left_to_him(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "PORTS", 3)
    here = made(tmp_path)
    with taken(FIRST_PORT + 1):
        for _ in range(4):
            assert set(ports(here.of(spec(), Role.PREFILL))) == {FIRST_PORT, FIRST_PORT + 2}


def test_ports_are_tried_where_the_engine_will_listen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "PORTS", 2)
    with taken(FIRST_PORT):
        assert "free at" in sentence(StartError, made(tmp_path).of, spec(), Role.PREFILL)
        assert FIRST_PORT in ports(made(tmp_path, bind="127.1.2.4").of(spec(), Role.PREFILL))


def test_fixed_ports_are_taken_as_they_are(tmp_path: Path) -> None:
    here = made(tmp_path)
    for _ in range(2):
        launch = here.of(spec(ports=(31234, 31235)), Role.PREFILL)
        assert ports(launch) == (31234, 31235)
        assert launch.url == f"http://{HERE}:31234"


@pytest.mark.parametrize("which", [0, 1])
def test_a_fixed_port_that_is_taken_is_said(tmp_path: Path, which: int) -> None:
    with taken(0) as port:
        fixed = (port, 31236) if which == 0 else (31236, port)
        said = sentence(StartError, made(tmp_path).of, spec("gpu1-a", ports=fixed), Role.PREFILL)
    assert said == (
        f"the engine gpu1-a cannot be started: port {port} on {HERE} is taken by another program; stop that, or give the"
        " engine other `ports` in its entry of [[engines]]"
    )


def test_settings_take_no_ports_and_hold_no_key(tmp_path: Path) -> None:
    here = made(tmp_path)
    with taken(31237):
        settings = here.settings(spec(ports=(31237, 31238)), Role.PREFILL)
    assert not {"31237", "31238", "--port"} & set(settings)
    first, second = (here.of(spec(), Role.PREFILL) for _ in range(2))
    assert first.settings == second.settings == settings
    assert first.argv != second.argv
    assert first.api_key != second.api_key
    assert len(first.api_key) >= 32
    assert not {first.api_key, second.api_key} & set(settings)
    assert here.settings(spec(), Role.DECODE) != settings


# --- sockets


@pytest.fixture
def far(tmp_path: Path) -> Iterator[Path]:
    """A state directory whose path is too long for a Unix socket; what it is replaced by goes away again."""
    root = tmp_path / ("long-" * 20)
    folder = root / "engines" / "a"
    yield folder
    for used in (folder, folder.with_name(f"{folder.name}2"), folder / "engines" / "a"):
        short = Path(f"/tmp/disagg-{os.getuid()}-{zlib.crc32(str(used).encode()):08x}")
        if short.is_dir() and not short.is_symlink():
            short.rmdir()
        else:
            short.unlink(missing_ok=True)


def test_a_short_folder_keeps_the_sockets(tmp_path: Path) -> None:
    longest = tmp_path / ("x" * (SOCKET_PATH_LIMIT - len("/kv-replay") - len(str(tmp_path)) - 1))
    assert module._sockets(longest) == longest


def test_the_folder_of_an_engine_with_a_long_name_gets_a_short_one_beside_it(tmp_path: Path) -> None:
    folder = tmp_path / "engines" / ("x" * 90)
    short = module._sockets(folder)
    assert short.parent == tmp_path / "s"
    assert stat.S_IMODE(short.stat().st_mode) == 0o700
    assert module._sockets(folder) == short
    assert module._sockets(folder.with_name("y" * 90)) != short


def test_a_long_folder_gets_a_short_one_that_is_private(far: Path) -> None:
    old = os.umask(0)
    try:
        short = module._sockets(far)
    finally:
        os.umask(old)
    assert len(str(short / "kv-replay")) <= SOCKET_PATH_LIMIT
    assert stat.S_IMODE(short.lstat().st_mode) == 0o700
    assert module._sockets(far) == short  # at the next start, too
    assert module._sockets(far.with_name(f"{far.name}2")) != short


def test_the_engine_publishes_there(far: Path) -> None:
    source = made(far).of(spec(), Role.PREFILL).kv_events
    assert source is not None
    assert source.events.startswith("ipc:///tmp/disagg-")
    assert len(source.replay.removeprefix("ipc://")) <= SOCKET_PATH_LIMIT


@pytest.mark.parametrize("what", ["open", "link", "link to nothing", "file", "somebody else's"])
def test_a_short_folder_that_is_not_ours_alone_is_refused(far: Path, tmp_path: Path, what: str) -> None:
    short = module._sockets(far)
    short.rmdir()
    match what:
        case "open":
            short.mkdir()
            short.chmod(0o750)
        case "link" | "link to nothing":
            target = tmp_path / "target"
            if what == "link":
                target.mkdir(mode=0o700)
            short.symlink_to(target)
        case "file":
            short.touch(mode=0o600)
        case _:
            if os.getuid() != 0:
                pytest.skip("only root can give a folder away")
            short.mkdir(mode=0o700)
            os.chown(short, 65534, 65534)
    said = sentence(StartError, module._sockets, far)
    assert said == f"{short} is not this user's alone: remove it, or choose a --state-dir with a shorter path"


# --- the model


def model(folder: Path, *files: str) -> Path:
    folder.mkdir(parents=True)
    for name in files:
        (folder / name).write_text("{}")
    return folder


def of(**engine: Any) -> tuple[str, str]:
    return model_of(Config(engine=EngineSection(**engine)))


@pytest.mark.parametrize("engine", ["embedded", "sglang"])
def test_the_demo_model_is_the_default(engine: str) -> None:
    assert of(engine=engine) == (str(DEMO_MODEL), "demo")
    assert of(engine=engine, served_name="x") == (str(DEMO_MODEL), "x")


def test_a_folder_is_served_under_its_own_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = model(tmp_path / "Llama-3.1-8B", "config.json")
    assert of(engine="sglang", model=str(folder)) == (str(folder), "Llama-3.1-8B")
    assert of(engine="sglang", model=str(folder), served_name="llama") == (str(folder), "llama")
    monkeypatch.chdir(folder)
    assert of(model=".") == (str(folder), "Llama-3.1-8B")


def test_a_link_to_a_folder_stays_a_link_and_lends_its_targets_name(tmp_path: Path) -> None:
    folder = model(tmp_path / "Llama-3.1-8B", "config.json")
    link = tmp_path / "current"
    link.symlink_to(folder)
    assert of(model=str(link)) == (str(link), "Llama-3.1-8B")


def test_sglang_may_look_a_name_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert of(engine="sglang", model="Qwen/Qwen3-8B") == ("Qwen/Qwen3-8B", "Qwen3-8B")
    assert sentence(StartError, lambda: of(engine="embedded", model="Qwen/Qwen3-8B")) == (
        "the model folder Qwen/Qwen3-8B is not there: give a Hugging Face folder with --model"
    )
    model(tmp_path / "Qwen" / "Qwen3-8B")  # a folder of that name that is there is meant, even when it is no model
    said = sentence(StartError, lambda: of(engine="sglang", model="Qwen/Qwen3-8B"))
    assert said == "the model folder Qwen/Qwen3-8B has no config.json: give a Hugging Face folder with --model"


@pytest.mark.parametrize("name", ["/models/gone", "a/b/c", "gone", "a b/c"])
def test_what_is_no_name_and_not_there_is_refused(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    said = sentence(StartError, lambda: of(engine="sglang", model=name))
    assert said == f"the model folder {name} is not there: give a Hugging Face folder with --model"


def test_a_model_that_cannot_be_looked_at_is_a_sentence_and_no_crash() -> None:
    name = "/" + "x" * 300
    said = sentence(StartError, lambda: of(engine="sglang", model=name))
    assert said == f"the model folder {name} cannot be read: File name too long; open it to the user who runs disagg"


def test_a_hash_goes_along_where_it_can_be_had(tmp_path: Path) -> None:
    demo = made(tmp_path).of(spec(), Role.PREFILL)
    assert len(demo.model_hash) == 16
    odd = model(tmp_path / "pytorch-only", "config.json")
    assert made(tmp_path, model=str(odd)).of(spec(), Role.PREFILL).model_hash == ""
    (odd / "tokenizer.json").mkdir()
    (odd / "model.safetensors").touch()
    assert made(tmp_path, model=str(odd)).of(spec(), Role.PREFILL).model_hash == ""
    assert made(tmp_path, model="Qwen/Qwen3-8B").of(spec(), Role.PREFILL).model_hash == ""


# --- of, and check


def test_each_engine_has_a_folder_of_its_own(tmp_path: Path) -> None:
    launch = made(tmp_path).of(spec("gpu1-a"), Role.PREFILL)
    assert launch.log_file == tmp_path / "engines" / "gpu1-a" / "log"
    assert launch.log_file.parent.is_dir()
    assert launch.ready_file is None


def test_a_folder_that_cannot_be_made_is_a_sentence_and_no_crash(tmp_path: Path) -> None:
    (tmp_path / "engines").touch()
    said = sentence(StartError, made(tmp_path).of, spec(), Role.PREFILL)
    assert said == f"the engine a cannot be started: {tmp_path / 'engines' / 'a'}: Not a directory"


def test_an_entry_of_the_host_reaches_its_engine(tmp_path: Path) -> None:
    here = made(tmp_path, ib_device="mlx5_9", engine_args=("--a", "1"), transfer_backend="mooncake")
    one = spec(gpus=(2, 3), ib_device="mlx5_0", numa=(1, 0), args=("--b", "2"))
    launch = here.of(one, Role.DECODE)
    text = " ".join(launch.argv)
    assert "--disaggregation-ib-device mlx5_0" in text
    assert "--numa-node 1 0 " in text
    assert launch.argv[-4:] == ("--a", "1", "--b", "2")
    assert launch.env["CUDA_VISIBLE_DEVICES"] == "2,3"
    assert launch.role is Role.DECODE
    assert "--disaggregation-ib-device mlx5_9" in " ".join(here.of(spec(), Role.DECODE).argv)


@pytest.mark.skipif(shutil.which("setpriv") is None, reason="util-linux is not here")
def test_engines_of_up_end_with_it(tmp_path: Path) -> None:
    argv = made(tmp_path, is_child=True).of(spec(), Role.PREFILL).argv
    assert argv[1:4] == ("--pdeathsig", "KILL", "--")
    assert argv[4] == str(tmp_path / "sglang" / "bin" / "python")
    assert "--pdeathsig" not in made(tmp_path).of(spec(), Role.PREFILL).argv


def test_check_takes_what_can_work(tmp_path: Path) -> None:
    made(tmp_path, sglang_python="/not/even/there").check(spec())  # only settings: the host may still get its SGLang
    Launches(Config(), HERE, tmp_path, is_child=False).check(spec())


@pytest.mark.parametrize("section", [{"nodes": 2}, {"tp_size": 2}, {"device": "cuda"}, {"kv_events": False}, {"i_know": True}])
def test_what_would_do_nothing_for_the_embedded_engine_is_refused(tmp_path: Path, section: dict[str, Any]) -> None:
    config = Config(engine=EngineSection(**section))
    ((name, value),) = section.items()
    assert sentence(ConfigError, Launches(config, HERE, tmp_path, is_child=False).check, spec()) == (
        f'engine.{name} = {value!r} is for SGLang, and the engine is embedded: set engine.engine = "sglang"'
    )


@pytest.mark.parametrize("more", [{"gpus": (0,)}, {"ib_device": "mlx5_0"}, {"numa": (0,)}])
def test_a_host_whose_entry_names_gpus_does_not_fall_back_to_its_cpu(
    tmp_path: Path, more: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "find_device", lambda device, _: "cpu")
    said = sentence(StartError, made(tmp_path, device="auto").of, spec(**more), Role.PREFILL)
    assert "this host shows no GPU in /dev: check the driver with nvidia-smi" in said
    assert made(tmp_path, device="cpu").of(spec(**more), Role.PREFILL)
    assert made(tmp_path, device="auto").of(spec(), Role.PREFILL)


def test_check_says_what_cannot_work_on_any_host(tmp_path: Path) -> None:
    assert "would listen on every address" in sentence(ConfigError, made(tmp_path, at="0.0.0.0").check, spec())
    wild = spec(args=("--host", "0.0.0.0"))
    assert "would listen on every address" in sentence(ConfigError, made(tmp_path).check, wild)
    assert "2 GPUs on 1 host" in sentence(ConfigError, made(tmp_path, tp_size=4).check, spec(gpus=(0, 1)))
    assert "page_size = 8 is too small" in sentence(ConfigError, made(tmp_path, page_size=8).check, spec())
    assert "engine.dist_address must say" in sentence(ConfigError, made(tmp_path, nodes=2).check, spec())


def test_the_embedded_engine_gets_its_settings(tmp_path: Path) -> None:
    here = made(tmp_path, engine="embedded", page_size=32)
    launch = here.of(spec(gpus=(1,), ports=(31240, 31241)), Role.PREFILL)
    text = " ".join(launch.argv)
    assert f"--host {HERE} --port 31240 --disaggregation-mode prefill --disaggregation-bootstrap-port 31241 --page-size 32" in text
    assert "--enable-pd-role-switch" in text
    assert "--enable-pd-role-switch" not in here.of(spec(role=Role.UNIFIED), Role.UNIFIED).argv
    assert launch.env[module.KEY_VARIABLE] == launch.api_key != ""
    assert launch.api_key not in text
    assert made(tmp_path, engine="embedded", is_child=True).of(spec(), Role.PREFILL).api_key == ""
