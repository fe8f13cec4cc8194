"""What an engine's log says: of its start, and of why it ended. The logs are SGLang's own, of 0.5.23 on a CPU, cut to what matters."""

from __future__ import annotations

from pathlib import Path

import pytest

from disagg.engines.diagnosis import LIMIT, hopeless, is_lasting, progress, why

LOGS = Path(__file__).parent / "data" / "sglang_logs"
GOOD = ("good-prefill", "good-decode")
TAKEN = "port {} on 127.0.0.1 is taken by another program: stop that, or give the engine other ports"
ENDS = {
    "model-missing": (1, "the model folder /opt/models/gone is not there: give one with --model", True),
    "bad-flag": (2, "it does not know the arguments --no-such-flag 3: check engine_args, and which release this is", True),
    "bad-value": (2, "it refuses an argument --page-size: invalid int value: 'banana'", True),
    "no-gpu": (-9, "it finds no usable GPU on this host: check the driver with nvidia-smi, or set engine.device", True),
    "nixl-missing": (-9, "its KV transfer backend is not installed: install it, or choose another engine.transfer_backend", True),
    "http-port-taken": (-9, TAKEN.format(32400), False),
    "bootstrap-port-taken": (-9, TAKEN.format(32501), False),
}


def log(name: str) -> str:
    """As `EngineProcess.log_text` gives it: with its carriage returns."""
    return (LOGS / f"{name}.log").read_bytes().decode()


def growing(text: str) -> list[str]:
    """What an agent reads while it is being written."""
    lines = text.splitlines(keepends=True)
    return ["".join(lines[:end]) for end in range(len(lines) + 1)]


# --- real logs


@pytest.mark.parametrize("name", ENDS)
def test_why_an_engine_ended(name: str) -> None:
    code, said, lasting = ENDS[name]
    assert why(log(name), code) == said
    assert why(log(name), None) == said  # an adopted one: nobody knows its code
    assert is_lasting(log(name)) is lasting


@pytest.mark.parametrize("name", GOOD)
def test_a_good_log_names_no_cause(name: str) -> None:
    """SGLang says at each start which models it cannot load for want of a package. That is no reason to give this engine up."""
    assert "No module named" in log(name)
    assert not is_lasting(log(name))
    assert hopeless(log(name)) == ""
    assert why(log(name), -9) == "somebody killed it, or this machine ran out of memory (see `journalctl -k`)"


def test_a_death_after_a_good_start_is_told_by_its_own_error() -> None:
    text = log("good-prefill") + "[2026-11-21 09:40:00] ValueError: a length that cannot be\n"
    assert why(text, 1) == "ValueError: a length that cannot be"
    assert not is_lasting(text)


@pytest.mark.parametrize("name", GOOD)
def test_a_start_is_told_phase_by_phase(name: str) -> None:
    told = list(dict.fromkeys(progress(text) for text in growing(log(name))))
    assert told == [
        *("", "it reads its settings", "it sets up its ranks", "it loads the weights", "it loads the weights, 0 %"),
        *("it loads the weights, 100 %", "the weights are loaded", "its KV pool is allocated", "it warms up", "it is ready"),
    ]


@pytest.mark.parametrize(("name", "port"), [("http-port-taken", 32400), ("bootstrap-port-taken", 32501)])
def test_a_start_that_cannot_succeed_is_seen_as_soon_as_it_is_said(name: str, port: int) -> None:
    """With its HTTP port taken SGLang never ends, and with its bootstrap port taken it says that it is ready."""
    said = [hopeless(text) for text in growing(log(name))]
    first = next(i for i, line in enumerate(log(name).splitlines()) if "[Errno 98]" in line)
    assert set(said[: first + 1]) == {""}
    assert set(said[first + 1 :]) == {TAKEN.format(port)}


@pytest.mark.parametrize("name", [name for name in ENDS if "port" not in name])
def test_an_engine_that_ends_by_itself_needs_no_kill(name: str) -> None:
    assert {hopeless(text) for text in growing(log(name))} == {""}


@pytest.mark.parametrize("name", [*ENDS, *GOOD])
def test_the_logs_kept_here_hold_no_secret_and_no_place(name: str) -> None:
    text = log(name)
    assert "secretkey" not in text
    assert not [word for word in ("/root", "/home", "/work") if word in text]
    assert len(text) < 8192


# --- single lines, as SGLang, PyTorch and the driver word them; most need a GPU, so no log of them was had here


@pytest.mark.parametrize(
    ("line", "part", "lasting"),
    [
        ("torch.OutOfMemoryError: CUDA out of memory. Tried to allocate 2.00 GiB.", "ran out of GPU memory: lower engine.mem_fr", False),
        ("torch.cuda.OutOfMemoryError: HIP out of memory", "ran out of GPU memory", False),
        ("RuntimeError: Not enough memory. Please try to increase --mem-fraction-static.", "no memory for a KV pool: raise", False),
        ("numpy._core._exceptions._ArrayMemoryError: Unable to allocate", "this machine has no memory left", False),
        ("OSError: [Errno 12] Cannot allocate memory", "this machine has no memory left", False),
        ("OSError: org/nope is not a local folder and is not a valid model identifier", "the model org/nope is neither", True),
        ("OSError: /m/x does not appear to have a file named config.json.", "the model folder /m/x has no config.json", True),
        ("ImportError: Please install mooncake by following the instructions", "transfer backend is not installed", True),
        ("ModuleNotFoundError: No module named 'mooncake'", "transfer backend is not installed", True),
        ("ImportError: libibverbs.so.1: cannot open shared object file", "system library libibverbs.so.1 is missing", True),
        ("RuntimeError: Found no NVIDIA driver on your system.", "no usable GPU on this host", True),
        ("RuntimeError: No CUDA GPUs are available", "no usable GPU on this host", False),
        ("RuntimeError: CUDA error: invalid device ordinal", "check `gpus` of its entry in [[engines]]", True),
        ("Context: device=cuda gpu_id=3 CUDA_VISIBLE_DEVICES=0,1 tp_rank=3", "check `gpus` of its entry in [[engines]]", False),
        ("/usr/bin/python3: No module named sglang", "SGLang is not installed in its Python", True),
        ("torch.distributed.DistBackendError: NCCL error in: x.cpp:1", "its ranks cannot talk to each other (NCCL)", False),
        ("ValueError: pool memory leak detected! [full]", "pages of its KV pool were lost", False),
        ("Scheduler watchdog timeout (self.watchdog_timeout=300, self.soft=False)", "its own watchdog ended it", False),
        ("launch_server.py: error: the following arguments are required: --model-path", "lacks the arguments --model-path", True),
        ("RuntimeError: Address already in use", "one of its ports is taken", False),
    ],
)
def test_what_a_line_means(line: str, part: str, lasting: bool) -> None:
    text = f"[2026-11-21 09:41:40] before\n{line}\nafter\n"
    assert part in why(text, 1)
    assert is_lasting(text) is lasting


def test_a_model_that_lacks_a_package_is_of_no_account() -> None:
    for what in ("No module named 'mooncake.store'", "libcudart.so.12: cannot open shared object file"):
        text = f"[2026-11-21 09:41:40] Ignore import error when loading sglang.srt.models.x: {what}\nRuntimeError: real\n"
        assert why(text, 1) == "RuntimeError: real"
        assert not is_lasting(text)
        assert is_lasting(text + f"ImportError: {what}\n")


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("Capture target decode CUDA graph begin. backend=full, num_tokens_per_req=1", "it captures CUDA graphs"),
        ("Capture target prefill CUDA graph begin. backend=breakable", "it captures CUDA graphs"),
        ("Capture cuda graph begin. This can take up to several minutes.", "it captures CUDA graphs"),
        ("Capturing batches (bs=8 avail_mem=9.17 GB):  52%|█████ | 12/23", "it captures CUDA graphs, 52 %"),
        ("Capture target decode CUDA graph end. bs=[1, 2], elapsed=9.71 s", "its CUDA graphs are captured"),
        ("Loading safetensors checkpoint shards:  75% Completed | 3/4", "it loads the weights, 75 %"),
    ],
)
def test_phases_of_a_gpu(line: str, said: str) -> None:
    assert progress(f"Init parallel begin.\n{line}\n") == said


def test_the_last_phase_counts_and_not_the_last_of_the_table() -> None:
    assert progress("Load weight end.\nLoad weight begin.\n") == "it loads the weights"


# --- what is not known


def test_the_last_error_is_told() -> None:
    text = "Traceback (most recent call last):\nKeyError: 'a'\nsglang.OddError: first\n[09:41:40] pkg.Last_Exception: b\nbye\n"
    assert why(text, 1) == "pkg.Last_Exception: b"


def test_an_exception_without_a_name_of_its_own_is_told() -> None:
    assert why("Exception: Capture cuda graph failed: oh\nPossible solutions:\n", 1) == "Exception: Capture cuda graph failed: oh"


def test_without_an_error_the_last_line_is_told() -> None:
    assert why("one\ntwo  \n\n", 1) == "two"
    assert why("an Error: in the middle of a line\nlast\n", 1) == "last"
    assert why("", 1) == why("\n \n", None) == "its log says nothing"


def test_a_kill_is_somebodys() -> None:
    assert "somebody killed it" in why("working\n", -9)
    assert why("working\nkill_process_tree called: parent_pid=1\n", -9) == "kill_process_tree called: parent_pid=1"  # its own
    assert why("working\n", -11) == "working"


def test_it_is_never_long() -> None:
    assert len(why("ValueError: " + "x" * 5000, 1)) == LIMIT
    assert why("ValueError: " + "x" * 5000, 1).endswith("...")
    assert len(why("sglang serve: error: unrecognized arguments: " + "x " * 5000, 2)) == LIMIT
