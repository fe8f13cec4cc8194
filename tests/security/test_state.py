"""Private files: who may read them, and that they are whole or absent whatever happens to their writer."""

from __future__ import annotations

import os
import random
import resource
import signal
import subprocess
import sys
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from disagg.errors import ConfigError, StartError
from disagg.security import state
from disagg.security.state import create_private, host_folder, is_host_name, read_private, remove_private, state_root, write_private
from tests.security.users import NOBODY, STRANGER, as_nobody, folder_of_nobody, mode, needs_root, umask

LIMIT_S = 30.0


def files_of(folder: Path) -> list[str]:
    return sorted(p.name for p in folder.iterdir())


def refusal(call: Callable[[], object]) -> str:
    with pytest.raises(StartError) as caught:
        call()
    sentence = str(caught.value)
    assert "\n" not in sentence
    return sentence


# --- where it is


@pytest.mark.parametrize(
    ("flag", "environ", "expected"),
    [
        ("/flag", {"DISAGG_STATE_DIR": "/env", "STATE_DIRECTORY": "/unit", "XDG_STATE_HOME": "/xdg"}, "/flag"),
        (Path("/flag"), {}, "/flag"),
        (None, {"DISAGG_STATE_DIR": "/env", "STATE_DIRECTORY": "/unit", "XDG_STATE_HOME": "/xdg"}, "/env"),
        (None, {"DISAGG_STATE_DIR": "", "STATE_DIRECTORY": "/unit:/other", "XDG_STATE_HOME": "/xdg"}, "/unit"),
        (None, {"STATE_DIRECTORY": "", "XDG_STATE_HOME": "/xdg", "HOME": "/home/me"}, "/xdg/disagg"),
        (None, {"XDG_STATE_HOME": "relative", "HOME": "/home/me"}, "/home/me/.local/state/disagg"),
        (None, {"XDG_STATE_HOME": "", "HOME": "/home/me"}, "/home/me/.local/state/disagg"),
    ],
)
def test_the_state_is_where_the_nearest_word_says(flag: str | Path | None, environ: dict[str, str], expected: str) -> None:
    with as_nobody():
        assert state_root(flag, environ) == Path(expected)


@needs_root
def test_the_state_of_root_is_the_systems() -> None:
    assert state_root(None, {"XDG_STATE_HOME": "/xdg", "HOME": "/root"}) == Path("/var/lib/disagg")
    assert state_root(None, {"STATE_DIRECTORY": "/unit"}) == Path("/unit")


def test_a_relative_state_directory_does_not_move_with_the_process(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert state_root("here", {}) == tmp_path / "here"


def test_the_paths_in_it() -> None:
    root = Path("/s")
    assert state.router_key_path(root) == Path("/s/router/key")
    assert state.router_tokens_path(root) == Path("/s/router/tokens")
    assert state.router_hosts_path(root) == Path("/s/router/hosts.json")
    assert host_folder(root, "gpu-1.example") == Path("/s/hosts/gpu-1.example")


@pytest.mark.parametrize("name", ["", ".", "..", "a/b", "/a", "../a", "-a", ".a", "a b", "a\n", "ä", "\u0661", "a" * 64, "a\0"])
def test_a_host_name_that_could_lead_elsewhere_is_refused(name: str) -> None:
    assert not is_host_name(name)
    with pytest.raises(ConfigError, match="--name"):
        host_folder(Path("/s"), name)


# --- who may read it


@pytest.mark.parametrize("mask", [0, 0o077, 0o177])
def test_modes_do_not_depend_on_the_umask(mask: int, tmp_path: Path) -> None:
    with umask(mask):
        write_private(tmp_path / "a" / "b" / "written", b"x")
        assert create_private(tmp_path / "c" / "d" / "created", b"x")
    assert [mode(tmp_path / name) for name in ("a", "a/b", "c", "c/d")] == [0o700] * 4
    assert [mode(tmp_path / name) for name in ("a/b/written", "c/d/created")] == [0o600] * 2


def test_no_moment_at_which_others_could_read_it(tmp_path: Path) -> None:
    """Every file that is ever seen in the folder is 0600 from its first moment, with the umask at its loosest."""
    seen: set[int] = set()
    done = threading.Event()

    def look() -> None:
        while not done.is_set():
            for entry in os.scandir(tmp_path):
                try:
                    seen.add(entry.stat().st_mode & 0o777)
                except FileNotFoundError:
                    continue

    watcher = threading.Thread(target=look)
    with umask(0):
        watcher.start()
        try:
            for _ in range(200):
                write_private(tmp_path / "key", b"x" * 1000)
        finally:
            done.set()
            watcher.join()
    assert seen == {0o600}


def test_a_loose_file_is_tight_after_it_is_written_again(tmp_path: Path) -> None:
    path = tmp_path / "key"
    path.write_bytes(b"old")
    path.chmod(0o666)
    write_private(path, b"new")
    assert (mode(path), read_private(path)) == (0o600, b"new")


def test_folders_that_exist_keep_their_mode(tmp_path: Path) -> None:
    tmp_path.chmod(0o755)
    write_private(tmp_path / "key", b"x")
    assert mode(tmp_path) == 0o755


@pytest.mark.parametrize(
    ("loose", "word"), [(0o644, "read"), (0o640, "read"), (0o604, "read"), (0o666, "read"), (0o620, "written"), (0o602, "written")]
)
def test_a_file_that_others_can_open_is_refused(loose: int, word: str, tmp_path: Path) -> None:
    path = tmp_path / "my key"
    path.write_bytes(b"secret words")
    path.chmod(loose)
    said = refusal(lambda: read_private(path))
    assert said == f"{path} can be {word} by others (mode {loose:04o}): chmod 600 '{path}'"
    path.chmod(0o600)
    assert read_private(path) == b"secret words"
    path.chmod(0o400)
    assert read_private(path) == b"secret words"


def test_what_is_not_there_is_none(tmp_path: Path) -> None:
    assert read_private(tmp_path / "no" / "key") is None


@needs_root
def test_a_file_of_a_stranger_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "key"
    write_private(path, b"x")
    os.chown(path, STRANGER, STRANGER)
    assert f"belongs to uid {STRANGER}" in refusal(lambda: read_private(path))


@needs_root
def test_what_root_writes_in_a_services_folder_is_the_services() -> None:
    with folder_of_nobody() as folder:
        path = folder / "router" / "tokens" / "t"
        write_private(path, b"from root")
        assert create_private(folder / "router" / "key", b"from root")
        made = [folder / "router", folder / "router" / "tokens", path, folder / "router" / "key"]
        assert [p.stat().st_uid for p in made] == [NOBODY] * 4
        assert [p.stat().st_gid for p in made] == [NOBODY] * 4
        assert read_private(path) == b"from root"  # root trusts a service's file in the service's folder
        with as_nobody():
            assert read_private(path) == b"from root"
            write_private(path, b"from the service")
            assert remove_private(path)


@needs_root
def test_a_file_of_root_that_a_service_can_open_is_trusted() -> None:
    with folder_of_nobody() as folder:
        path = folder / "key"
        path.write_bytes(b"x")
        path.chmod(0o600)
        with as_nobody():
            assert f"cannot read {path}: not permitted" in refusal(lambda: read_private(path))


@pytest.mark.parametrize("make", [os.mkfifo, os.mkdir], ids=["pipe", "folder"])
def test_what_is_no_file_is_refused_without_waiting(make: Callable[[Path], None], tmp_path: Path) -> None:
    make(tmp_path / "key")
    assert "is not a file" in refusal(lambda: read_private(tmp_path / "key"))


# --- whole or absent


WRITER = """
import sys
from pathlib import Path
from disagg.security.state import write_private
path = Path(sys.argv[1])
print("ready", flush=True)
while True:
    for letter in (b"a", b"b"):
        write_private(path, letter * 2_000_000)
"""


def test_a_writer_that_is_killed_leaves_a_whole_file(tmp_path: Path) -> None:
    path = tmp_path / "key"
    write_private(path, b"a" * 2_000_000)
    pause = threading.Event()
    chance = random.Random(1)
    for _ in range(15):
        process = subprocess.Popen([sys.executable, "-c", WRITER, str(path)], stdout=subprocess.PIPE)
        assert process.stdout is not None
        with process.stdout as lines:
            assert lines.readline() == b"ready\n"
            pause.wait(chance.uniform(0, 0.02))  # any moment of its work will do
            process.send_signal(signal.SIGKILL)
            process.wait(LIMIT_S)
        found = read_private(path)
        assert found in {b"a" * 2_000_000, b"b" * 2_000_000}
    write_private(path, b"after")  # whatever drafts they left
    assert read_private(path) == b"after"


def test_a_draft_of_a_crashed_writer_hurts_nobody(tmp_path: Path) -> None:
    for stale in (".key.tmp", ".key.0123456789abcdef.tmp"):
        (tmp_path / stale).write_bytes(b"half")
    write_private(tmp_path / "key", b"x")
    assert read_private(tmp_path / "key") == b"x"


def test_a_write_that_fails_half_way_leaves_the_old_file_and_nothing_else(tmp_path: Path) -> None:
    path = tmp_path / "key"
    write_private(path, b"old")
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, hard))
    try:
        said = refusal(lambda: write_private(path, b"n" * 10_000))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert said == f"cannot write {path}: File too large; choose another folder with --state-dir"
    assert (files_of(tmp_path), read_private(path)) == (["key"], b"old")


ON_A_DISK_OF_ITS_OWN = """
import subprocess, sys
from pathlib import Path
from disagg.errors import StartError
from disagg.security.state import create_private, read_private, remove_private, write_private
folder = Path(sys.argv[1])
def mount(*words):
    if subprocess.run(["mount", *words, str(folder)], stderr=subprocess.DEVNULL).returncode:
        print("cannot mount")
        sys.exit()
def said(call):
    try:
        call()
    except StartError as error:
        print(error)
    else:
        print("no error")
mount("-t", "tmpfs", "-o", "size=64k", "tmpfs")
write_private(folder / "key", b"old")
said(lambda: write_private(folder / "key", b"n" * 200_000))
said(lambda: create_private(folder / "other", b"n" * 200_000))
mount("-o", "remount,ro")
said(lambda: write_private(folder / "key", b"new"))
said(lambda: write_private(folder / "a" / "key", b"new"))
said(lambda: remove_private(folder / "key"))
print(sorted(p.name for p in folder.iterdir()), read_private(folder / "key"))
"""


@needs_root
def test_a_full_and_a_read_only_disk_say_so_and_keep_the_old_file(tmp_path: Path) -> None:
    command = ["unshare", "--mount", sys.executable, "-c", ON_A_DISK_OF_ITS_OWN, str(tmp_path)]
    result = subprocess.run(command, capture_output=True, text=True, timeout=LIMIT_S, check=False)
    if "unshare" in result.stderr or "cannot mount" in result.stdout:
        pytest.skip("this machine lets nobody mount")
    full, read_only = (
        "the disk is full; free some space and try again",
        "the file system is read-only; choose another folder with --state-dir",
    )
    assert result.stderr == ""
    assert result.stdout.splitlines() == [
        f"cannot write {tmp_path}/key: {full}",
        f"cannot write {tmp_path}/other: {full}",
        f"cannot write {tmp_path}/key: {read_only}",
        f"cannot write {tmp_path}/a/key: {read_only}",
        f"cannot remove {tmp_path}/key: {read_only}",
        "['key'] b'old'",
    ]


def test_a_folder_that_may_not_be_written_says_so_and_keeps_the_old_file() -> None:
    with folder_of_nobody() as folder, as_nobody():
        path = folder / "key"
        write_private(path, b"old")
        folder.chmod(0o500)
        advice = "not permitted; run as the folder's owner or choose another folder with --state-dir"
        assert refusal(lambda: write_private(path, b"new")) == f"cannot write {path}: {advice}"
        assert refusal(lambda: create_private(folder / "other", b"new")) == f"cannot write {folder}/other: {advice}"
        assert refusal(lambda: remove_private(path)) == f"cannot remove {path}: {advice}"
        assert (files_of(folder), read_private(path)) == (["key"], b"old")


def test_a_file_where_a_folder_should_be(tmp_path: Path) -> None:
    (tmp_path / "router").write_bytes(b"")
    assert "Not a directory" in refusal(lambda: write_private(tmp_path / "router" / "key", b"x"))
    assert "Not a directory" in refusal(lambda: read_private(tmp_path / "router" / "key"))


def test_a_link_to_nowhere_is_not_followed(tmp_path: Path) -> None:
    (tmp_path / "router").symlink_to(tmp_path / "elsewhere")
    assert "cannot write" in refusal(lambda: write_private(tmp_path / "router" / "key", b"x"))
    assert files_of(tmp_path) == ["router"]


def test_a_link_in_place_of_the_file_is_replaced_and_its_target_stays(tmp_path: Path) -> None:
    (tmp_path / "target").write_bytes(b"theirs")
    (tmp_path / "key").symlink_to(tmp_path / "target")
    write_private(tmp_path / "key", b"ours")
    assert not (tmp_path / "key").is_symlink()
    assert (tmp_path / "target").read_bytes() == b"theirs"


def descriptors() -> int:
    return sum(1 for _ in Path("/proc/self/fd").iterdir())


def test_no_descriptor_is_left_open(tmp_path: Path) -> None:
    before = descriptors()
    (tmp_path / "loose").write_bytes(b"x")
    (tmp_path / "loose").chmod(0o644)
    for number in range(20):
        write_private(tmp_path / str(number) / "a" / "key", b"x")
        create_private(tmp_path / "0" / "a" / "key", b"x")
        read_private(tmp_path / "0" / "a" / "key")
        remove_private(tmp_path / str(number) / "a" / "key")
        refusal(lambda: read_private(tmp_path / "loose"))
        refusal(lambda: read_private(tmp_path))
        refusal(lambda: write_private(tmp_path / "loose" / "key", b"x"))
    assert descriptors() == before


# --- at the same time


def at_once(threads: int, call: Callable[[int], bool]) -> list[bool]:
    """What each thread got; all of them start together."""
    gate = threading.Barrier(threads)

    def one(number: int) -> bool:
        gate.wait()
        return call(number)

    with ThreadPoolExecutor(threads) as pool:
        return list(pool.map(one, range(threads)))


def test_of_many_creators_one_wins_and_its_bytes_stay(tmp_path: Path) -> None:
    for round_ in range(30):
        path = tmp_path / str(round_) / "key"  # the folder is made by all of them at once, too
        won = at_once(6, lambda n, path=path: create_private(path, b"%d" % n))  # type: ignore[misc]
        assert won.count(True) == 1
        assert read_private(path) == b"%d" % won.index(True)
        assert files_of(path.parent) == ["key"]


def test_of_many_removers_one_wins(tmp_path: Path) -> None:
    path = tmp_path / "token"
    for _ in range(50):
        write_private(path, b"x")
        assert at_once(6, lambda _: remove_private(path)).count(True) == 1
    assert not remove_private(path)
    assert not remove_private(tmp_path / "no" / "token")
    assert files_of(tmp_path) == []
