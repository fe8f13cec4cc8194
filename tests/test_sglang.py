"""How a SGLang engine is started: its command and its environment, by role and by release."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import msgspec
import pytest

from disagg.engines import sglang
from disagg.engines.base import EngineLaunch, decode_kept, encode_kept
from disagg.engines.sglang import _NO_DECODE_CACHE, _NOT_SWITCHABLE, Release, Wanted, can_switch, check, launch, release
from disagg.errors import ConfigError
from disagg.model import EngineId, Role

KEY = "key-of-this-start"
NOW = release("0.5.23")
BEFORE_SWITCH = release("0.5.20")
BEFORE_EVENTS = release("0.5.19")
BEFORE_RETRACTION = release("0.5.17")
BEFORE_CACHE = release("0.5.10")
PAIR = (Role.PREFILL, Role.DECODE)


def wanted(role: Role = Role.PREFILL, **more: Any) -> Wanted:
    settings: dict[str, Any] = {
        "id": EngineId("gpu1-prefill"),
        "role": role,
        "host": "10.0.0.11",
        "python": Path("/opt/sglang/bin/python"),
        "model": "/models/llama",
        "served_name": "llama",
        "port": 30000,
        "bootstrap_port": 8998,
        "folder": Path("/state/engines/gpu1-prefill"),
        "sockets": Path("/state/engines/gpu1-prefill"),
        "api_key": KEY,
    }
    return Wanted(**settings | more)


def of(role: Role = Role.PREFILL, known: Release = NOW, **more: Any) -> EngineLaunch:
    return launch(wanted(role, **more), known, model_hash="abc")


def value(argv: Sequence[str], flag: str) -> str:
    """What stands behind a flag, which must stand there once."""
    assert argv.count(flag) == 1, f"{flag} stands {argv.count(flag)} times in {argv}"
    return argv[argv.index(flag) + 1]


def refused(**more: Any) -> str:
    with pytest.raises(ConfigError) as caught:
        check(wanted(**more))
    with pytest.raises(ConfigError):
        launch(wanted(**more), NOW)
    sentence = str(caught.value)
    assert sentence.isprintable()
    return sentence


# --- releases


@pytest.mark.parametrize(
    ("version", "can"),
    [
        ("0.5.8", set()),
        ("0.5.10", set()),
        ("0.5.11", {"decode_cache"}),
        ("0.5.17", {"decode_cache"}),
        ("0.5.18", {"decode_cache", "retraction"}),
        ("0.5.19.post1", {"decode_cache", "retraction"}),
        ("0.5.20", {"decode_cache", "retraction", "kv_events"}),
        ("0.5.21", {"decode_cache", "retraction", "kv_events", "role_switch"}),
        ("0.5.23", {"decode_cache", "retraction", "kv_events", "role_switch"}),
    ],
)
def test_what_a_release_can_do(version: str, can: set[str]) -> None:
    known = release(version)
    assert {name for name in ("decode_cache", "retraction", "kv_events", "role_switch") if getattr(known, name)} == can
    assert (known.version, known.note) == (version, "")


@pytest.mark.parametrize("version", ["0.5.24", "0.6.0", "1.0", "0.5.23.1000+cu130"])
def test_a_newer_release_is_taken_for_the_newest_that_was_tried(version: str) -> None:
    known = release(version)
    assert (known.role_switch, known.kv_events, known.decode_cache, known.retraction) == (True, True, True, True)
    newer = f"SGLang {version} is newer than 0.5.23, the newest that disagg was tried with"
    assert known.note == ("" if version.startswith("0.5.23") else newer)


@pytest.mark.parametrize("version", ["0.5.7", "0.5.7.post3", "0.4.99", "", "unknown"])
def test_an_old_release_is_refused(version: str) -> None:
    with pytest.raises(ConfigError, match=r"is too old: disagg drives 0\.5\.8 and newer, 0\.5\.23 was tried"):
        release(version)


# --- the command


def test_the_command_of_a_prefill_engine() -> None:
    one = of(Role.PREFILL, backend="mooncake")
    events = '{"publisher":"zmq","topic":"","endpoint":"ipc:///state/engines/gpu1-prefill/kv",'
    events += '"replay_endpoint":"ipc:///state/engines/gpu1-prefill/kv-replay"}'
    assert one.argv == (
        *("/opt/sglang/bin/python", "-m", "sglang.launch_server"),
        *("--model-path", "/models/llama", "--served-model-name", "llama", "--host", "10.0.0.11"),
        *("--page-size", "16", "--log-level-http", "warning"),
        *("--disaggregation-mode", "prefill", "--disaggregation-transfer-backend", "mooncake"),
        *("--disaggregation-decode-enable-radix-cache", "--enable-pd-role-switch"),
        *("--kv-events-config", events),
        *("--port", "30000", "--disaggregation-bootstrap-port", "8998"),
        *("--config", "/state/engines/gpu1-prefill/key.yaml"),
    )
    assert (one.url, one.bootstrap_port, one.api_key, one.model_hash, one.part) == ("http://10.0.0.11:30000", 8998, KEY, "abc", 0)
    assert one.ready_file is None


def test_a_decode_engine_differs_in_its_role_alone() -> None:
    """So that a flip need not restart it: it has a bootstrap port of its own, and both caches."""
    prefill, decode = of(Role.PREFILL).argv, of(Role.DECODE).argv
    assert [(a, b) for a, b in zip(prefill, decode, strict=True) if a != b] == [("prefill", "decode")]
    assert of(Role.DECODE).bootstrap_port == 8998


def test_a_unified_engine_knows_of_no_pairs() -> None:
    one = of(Role.UNIFIED, ib_device="mlx5_0")
    assert not [word for word in one.argv if word.startswith(("--disaggregation", "--enable-pd"))]
    assert one.bootstrap_port == 0
    assert one.kv_events is not None


@pytest.mark.parametrize("role", PAIR)
def test_an_older_release_gets_only_flags_that_it_knows(role: Role) -> None:
    def flags(known: Release) -> set[str]:
        return {word for word in of(role, known, device="cpu").argv if word.startswith("--")}

    retraction, cache = "--disaggregation-decode-retraction-backup", "--disaggregation-decode-enable-radix-cache"
    assert flags(NOW) - flags(BEFORE_SWITCH) == {"--enable-pd-role-switch"}
    assert flags(BEFORE_SWITCH) - flags(BEFORE_EVENTS) == {"--kv-events-config"}
    assert flags(BEFORE_EVENTS) - flags(BEFORE_RETRACTION) == {retraction}
    assert flags(BEFORE_RETRACTION) - flags(BEFORE_CACHE) == {cache}
    assert {"--disaggregation-mode", "--disaggregation-transfer-backend"} <= flags(BEFORE_CACHE)
    assert flags(release("9.9.9")) == flags(NOW)


def test_what_is_not_set_is_left_to_sglang() -> None:
    unset = ("--dtype", "--mem-fraction-static", "--max-total-tokens", "--max-running-requests", "--chunked-prefill-size", "--tp-size")
    more = ("--numa-node", "--device", "--nnodes", "--disaggregation-ib-device")
    assert not {*unset, *more} & set(of().argv)


def test_what_is_set_is_passed_on() -> None:
    argv = of(
        dtype="bfloat16",
        mem_fraction=0.85,
        kv_pool_tokens=100000,
        max_running_requests=64,
        chunk_tokens=8192,
        tp_size=8,
        numa=(0, 1),
        device="cuda",
        ib_device="mlx5_0,mlx5_1",
        page_size=64,
    ).argv
    expected = {
        "--dtype": "bfloat16",
        "--mem-fraction-static": "0.85",
        "--max-total-tokens": "100000",
        "--max-running-requests": "64",
        "--chunked-prefill-size": "8192",
        "--tp-size": "8",
        "--device": "cuda",
        "--disaggregation-ib-device": "mlx5_0,mlx5_1",
        "--page-size": "64",
    }
    assert {flag: value(argv, flag) for flag in expected} == expected
    at = argv.index("--numa-node")
    assert argv[at : at + 3] == ("--numa-node", "0", "1")


def test_numa_node_0_alone_is_a_choice_and_not_an_absence() -> None:
    assert value(of(numa=(0,)).argv, "--numa-node") == "0"


def test_on_a_cpu() -> None:
    argv = of(device="cpu").argv
    expected = {
        "--device": "cpu",
        "--dtype": "float32",
        "--max-total-tokens": "16384",
        "--attention-backend": "torch_native",
        "--cuda-graph-backend-decode": "disabled",
        "--cuda-graph-backend-prefill": "disabled",
        "--disaggregation-decode-retraction-backup": "cpu_tensor",
    }
    assert {flag: value(argv, flag) for flag in expected} == expected
    assert "--sleep-on-idle" in argv
    asked = of(device="cpu", dtype="bfloat16", kv_pool_tokens=512).argv
    assert (value(asked, "--dtype"), value(asked, "--max-total-tokens")) == ("bfloat16", "512")
    assert not set(expected) & set(of().argv)


def test_the_operators_arguments_stand_last_and_win() -> None:
    args = ("--page-size", "64", "--host", "10.0.0.12", "--port", "1", "--new-flag")
    one = of(args=args)
    assert one.argv[-len(args) :] == args
    assert one.settings[-len(args) :] == args
    assert one.url == "http://10.0.0.12:1"


def test_what_they_say_of_ports_and_key_is_where_the_engine_is_looked_for() -> None:
    one = of(Role.PREFILL, args=("--disaggregation-bootstrap-port", "9", "--api-key=mine"))
    assert (one.bootstrap_port, one.api_key) == (9, "mine")
    with pytest.raises(ConfigError, match="--port without a number: write a port"):
        of(args=("--port",))


@pytest.mark.parametrize("word", ["--hos", "--host-=x", "--por", "--api-k", "--model-pa"])
def test_a_flag_that_disagg_must_read_is_written_in_full(word: str) -> None:
    if word == "--host-=x":
        assert of(args=(word,)).argv[-1] == word  # another flag
        return
    with pytest.raises(ConfigError, match=f"{word}: write --"):
        of(args=(word, "1"))


@pytest.mark.parametrize("address", ["0", "0.0.0", "0x0", "::0", "0:0:0:0:0:0:0:0", "[::]", "::ffff:0.0.0.0", "*"])
def test_every_way_to_write_every_address_needs_the_word(address: str) -> None:
    with pytest.raises(ConfigError, match="i_know"):
        of(bind=address)
    assert of(bind=address, i_know=True)


def test_other_settings_in_the_environment_are_other_settings() -> None:
    assert of(gpus=(0,)).settings != of(gpus=(1,)).settings
    assert of(backend="mooncake").settings != of(backend="mooncake-tcp").settings
    assert of(path="/usr/bin").settings == of(path="/bin").settings


def test_addresses() -> None:
    assert value(of(bind="10.9.9.9").argv, "--host") == "10.9.9.9"
    assert of(bind="10.9.9.9").url == "http://10.0.0.11:30000"
    six = of(host="fd00::1")
    assert (value(six.argv, "--host"), six.url) == ("fd00::1", "http://[fd00::1]:30000")
    assert six.env["SGLANG_HOST_IP"] == "fd00::1"


def test_settings_are_what_does_not_change_from_start_to_start() -> None:
    one = of()
    again = of(port=30001, bootstrap_port=8999, api_key="another")
    assert one.settings == again.settings
    assert one.argv != again.argv
    assert of(mem_fraction=0.5).settings != one.settings
    assert of(args=("--x",)).settings != one.settings


# --- who may reach it


@pytest.mark.parametrize("address", ["0.0.0.0", "::", "[::]", "*"])
@pytest.mark.parametrize("way", ["advertised", "bind", "argument", "argument with ="])
def test_a_wildcard_address_needs_the_word(address: str, way: str) -> None:
    ways: dict[str, dict[str, Any]] = {
        "advertised": {"host": address},
        "bind": {"bind": address},
        "argument": {"args": ("--host", address)},
        "argument with =": {"args": ("--host=10.0.0.11", f"--host={address}")},
    }
    more = ways[way]
    said = refused(**more)
    assert f"would listen on every address ({address})" in said
    assert said.endswith("so bind it to the cluster's address, or say engine.i_know = true")
    assert launch(wanted(i_know=True, **more), NOW).argv


def test_an_empty_address_is_a_wildcard() -> None:
    assert "every address (empty)" in refused(host="")


def test_an_argument_can_take_a_wildcard_back() -> None:
    check(wanted(bind="0.0.0.0", args=("--host", "10.0.0.11")))


def test_the_key_is_in_a_file_and_in_no_command() -> None:
    one = of()
    assert KEY not in " ".join(one.argv)
    assert KEY not in " ".join(one.settings)
    assert KEY not in " ".join(one.env.values())
    assert KEY not in repr(one)
    assert one.secret_files == ((Path("/state/engines/gpu1-prefill/key.yaml"), f"api-key: {KEY}\n"),)
    assert value(one.argv, "--config") == "/state/engines/gpu1-prefill/key.yaml"


def test_the_file_is_for_this_user_alone(tmp_path: Path) -> None:
    """As the keeper writes it."""
    from disagg.security.state import write_private

    for path, content in of(folder=tmp_path / "engine").secret_files:
        write_private(path, content.encode())
    written = tmp_path / "engine" / "key.yaml"
    assert written.read_text() == f"api-key: {KEY}\n"
    assert written.stat().st_mode & 0o777 == 0o600


@pytest.mark.parametrize("args", [("--config", "/etc/mine.yaml"), ("--config=/etc/mine.yaml",)])
def test_the_key_is_in_the_command_only_where_the_operator_has_the_file(args: tuple[str, ...]) -> None:
    one = of(args=args)
    assert value(one.argv, "--api-key") == KEY
    assert one.secret_files == ()
    assert one.argv[-len(args) :] == args
    assert KEY not in " ".join(one.settings)


def test_a_launch_can_be_kept() -> None:
    one = of()
    assert decode_kept(encode_kept(one), EngineLaunch) == one


# --- role switch


def test_the_switch_is_offered_by_the_backends_that_have_it() -> None:
    offered = {b for b in ("mooncake", "mooncake-tcp", "nixl", "mori") if can_switch(wanted(backend=b), NOW)}
    assert offered == {"mooncake", "mooncake-tcp", "mori"}


def test_the_switch_is_left_out_where_nobody_wants_it() -> None:
    for more in ({"role_switch": False}, {"role": Role.UNIFIED}):
        assert "--enable-pd-role-switch" not in launch(wanted(**more), NOW).argv


@pytest.mark.parametrize(("flag", "harmless"), _NOT_SWITCHABLE)
@pytest.mark.parametrize("role", PAIR)
def test_the_switch_is_left_out_where_sglang_would_not_start_with_it(flag: str, harmless: str, role: Role) -> None:
    demands = ((flag, "8"), (f"{flag}=8",), (flag, harmless, flag, "8")) if harmless else ((flag,), (flag, "EAGLE"), (flag, "--other"))
    for args in demands:
        assert "--enable-pd-role-switch" not in of(role, args=args).argv, args
        cached = "--disaggregation-decode-enable-radix-cache" in of(role, args=args).argv
        assert cached is (flag not in {name for name, _ in _NO_DECODE_CACHE})
    fine = ((flag, harmless), (f"{flag}={harmless}",), (flag, "8", flag, harmless)) if harmless else ((f"{flag}-not", "8"),)
    for args in fine:
        assert "--enable-pd-role-switch" in of(role, args=args).argv, args


def test_the_list_of_what_cannot_be_switched_is_that_of_the_release() -> None:
    """So that nobody takes one out by accident; from `handle_pd_disaggregation` of 0.5.23."""
    groups = {
        *("--ep-size", "--moe-a2a-backend", "--pp-size", "--dcp-size", "--speculative-algorithm"),
        *("--enable-dp-attention-local-control-broadcast", "--enable-hisparse"),
        *("--disaggregation-decode-host-receive-threshold", "--disaggregation-decode-allocation-policy"),
    }
    assert groups <= {flag for flag, _ in _NOT_SWITCHABLE}


def test_the_cache_of_decode_engines_goes_where_all_caches_are_off() -> None:
    argv = of(args=("--disable-radix-cache",)).argv
    assert "--disaggregation-decode-enable-radix-cache" not in argv
    assert "--enable-pd-role-switch" in argv


# --- KV events


def test_events_go_over_sockets_in_a_folder_of_this_user() -> None:
    one = of(sockets=Path("/tmp/short"))
    assert one.kv_events is not None
    assert (one.kv_events.events, one.kv_events.replay) == ("ipc:///tmp/short/kv", "ipc:///tmp/short/kv-replay")
    config = msgspec.json.decode(value(one.argv, "--kv-events-config"))
    assert config == {"publisher": "zmq", "topic": "", "endpoint": one.kv_events.events, "replay_endpoint": one.kv_events.replay}


@pytest.mark.parametrize(
    "more",
    [
        {"kv_events": False},
        {"known": BEFORE_EVENTS},
        {"args": ("--dp-size", "2")},
        {"args": ("--dp=2",)},
        {"args": ("--data-parallel-size", "4")},
        {"nodes": 2, "node_rank": 1, "dist_address": "10.0.0.11:5000", "tp_size": 2},
    ],
    ids=str,
)
def test_events_are_left_out_where_they_cannot_work(more: dict[str, Any]) -> None:
    one = of(**more)
    assert one.kv_events is None
    assert "--kv-events-config" not in one.argv


def test_events_of_the_operators_own_are_his() -> None:
    one = of(args=("--kv-events-config", "{}"))
    assert one.kv_events is None
    assert value(one.argv, "--kv-events-config") == "{}"


def test_events_stay_where_one_rank_is_said_in_words() -> None:
    assert of(args=("--dp-size", "1")).kv_events is not None


def test_small_pages_and_events_do_not_go_together() -> None:
    assert refused(page_size=15) == ("engine.page_size = 15 is too small for KV events: write 16 or more, or engine.kv_events = false")
    check(wanted(page_size=16))
    check(wanted(page_size=1, kv_events=False))


# --- several GPUs and hosts


def test_an_engine_needs_as_many_gpus_as_ranks() -> None:
    said = refused(gpus=(0, 1), tp_size=4)
    assert said == "the engine gpu1-prefill has tp_size = 4 but sees 2 GPUs on 1 host: give it as many GPUs as ranks"
    assert "2 GPUs on 2 hosts" in refused(gpus=(0, 1), tp_size=8, nodes=2, dist_address="x:1")
    check(wanted(gpus=(0, 1), tp_size=4, nodes=2, dist_address="x:1"))
    check(wanted(gpus=(0, 1), tp_size=2))
    check(wanted(tp_size=8))


def test_an_engine_over_two_hosts() -> None:
    shared: dict[str, Any] = {"nodes": 2, "dist_address": "10.0.0.11:5000", "tp_size": 16}
    first, second = of(**shared), of(node_rank=1, **shared)
    for rank, one in enumerate((first, second)):
        expected = {"--nnodes": "2", "--node-rank": str(rank), "--dist-init-addr": "10.0.0.11:5000", "--tp-size": "16"}
        assert {flag: value(one.argv, flag) for flag in expected} == expected
        assert one.part == rank
    assert (first.kv_events is None, second.kv_events is None) == (False, True)


def test_several_hosts_need_a_place_to_meet_and_ranks_that_exist() -> None:
    assert refused(nodes=2) == "the engine gpu1-prefill spans 2 hosts: engine.dist_address must say HOST:PORT of its first one"
    assert refused(nodes=2, node_rank=2, dist_address="x:1") == "engine.node_rank = 2 is not allowed: 2 hosts have the ranks 0 to 1"
    assert refused(node_rank=1) == "engine.node_rank = 1 is not allowed: an engine on one host has rank 0"


# --- the environment


def test_timeouts_agree_with_those_of_the_router() -> None:
    env = of(wait_s=42.4).env
    assert {name.removeprefix("SGLANG_DISAGGREGATION_"): text for name, text in env.items() if "DISAGG" in name} == {
        "BOOTSTRAP_TIMEOUT": "42",
        "WAITING_TIMEOUT": "42",
        "HEARTBEAT_INTERVAL": "2",
        "HEARTBEAT_MAX_FAILURE": "2",
        "DEFERRED_DECODE_KV_RELEASE": "1",
        "DEFERRED_DECODE_KV_RELEASE_TIMEOUT": "30",
    }
    assert of(wait_s=0.2).env["SGLANG_DISAGGREGATION_WAITING_TIMEOUT"] == "1"  # 0 would be none, or for ever


def test_tcp_is_forced_where_there_is_no_rdma() -> None:
    tcp = of(backend="mooncake-tcp")
    assert tcp.env["MC_FORCE_TCP"] == "1"
    assert value(tcp.argv, "--disaggregation-transfer-backend") == "mooncake"
    for backend in ("mooncake", "nixl", "mori"):
        one = of(backend=backend)
        assert "MC_FORCE_TCP" not in one.env
        assert value(one.argv, "--disaggregation-transfer-backend") == backend


def test_the_environment_of_a_gpu_host() -> None:
    env = of(gpus=(4, 5)).env
    assert env["CUDA_VISIBLE_DEVICES"] == "4,5"
    assert env["SGLANG_HOST_IP"] == "10.0.0.11"
    assert (env["SGL_FORCE_SHUTDOWN"], env["PYTHONUNBUFFERED"]) == ("1", "1")
    assert not {"SGLANG_USE_CPU_ENGINE", "PYTHONPATH"} & set(env)
    assert "CUDA_VISIBLE_DEVICES" not in of().env
    assert of(gpus=(0,)).env["CUDA_VISIBLE_DEVICES"] == "0"


def test_the_environment_of_a_cpu_host() -> None:
    env = of(device="cpu", shim=Path("/opt/sglang/disagg-shim"), backend="mooncake-tcp").env
    assert (env["SGLANG_USE_CPU_ENGINE"], env["PYTHONPATH"], env["MC_FORCE_TCP"]) == ("1", "/opt/sglang/disagg-shim", "1")


# --- reading the operator's arguments


@pytest.mark.parametrize(
    ("args", "found"),
    [
        ((), None),
        (("--f",), ""),
        (("--f", "1"), "1"),
        (("--f=1",), "1"),
        (("--f=",), ""),
        (("--f", "--g"), ""),
        (("--f", "1", "--f", "2"), "2"),
        (("--f", "1", "--f=2"), "2"),
        (("--ff", "1"), None),
        (("--g", "--f=3"), "3"),
        (("--f=a=b",), "a=b"),
    ],
)
def test_the_last_value_of_a_flag_counts(args: tuple[str, ...], found: str | None) -> None:
    assert sglang.given(args, "--f") == found
