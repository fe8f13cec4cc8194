"""One cluster of real SGLang engines for all tests of this folder: a router, and a prefill, a decode and a unified host that join it.

Starting an engine costs some twenty seconds of a core, so whoever breaks one sees to it that it is whole again at the end of the test.
"""

from __future__ import annotations

import contextlib
import json
import os
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import httpx2
import pytest

from disagg.engines.base import EngineRecord, decode_kept
from disagg.errors import StartError
from disagg.launches import find_python
from tests.cluster.prompts import prompt_ids
from tests.serve.conftest import Site, wait_for

ENGINE = ["--engine", "sglang", "--device", "cpu", "--chunk-tokens", "512"]
"""A client that leaves waits for the chunk that is being computed: half a second of this machine, and not two."""
PLAIN_JSON = [
    *("--engine-arg", "--constrained-json-disable-any-whitespace"),
    *("--engine-arg", "--tool-call-parser", "--engine-arg", "qwen25"),
]
"""Without the first, so small a model fills an answer with spaces."""
PLACES = 8
FEW_PLACES = ["--max-running-requests", str(PLACES)]
"""So few clients keep an engine busy."""
START_LIMIT_S = 240.0
BACK_LIMIT_S = 120.0


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    here = Path(__file__).parent
    for item in items:
        if here in item.path.parents:
            item.add_marker(pytest.mark.sglang)


class Cluster(Site):
    """A router, and the hosts `p`, `d` and `u`, whose engines have the same names.

    Attributes:
        rested_since: when the last role switch was over and nothing ran any more; None where nobody switched.
        rested_pids: of the engines that were switched.
    """

    rested_since: float | None = None
    rested_pids: Mapping[str, int] = {}

    def record(self, engine: str) -> EngineRecord:
        """How an agent of this test would find it again: pid, log, key."""
        path = self.folder / engine / "engines" / engine / "record.json"
        return decode_kept(path.read_bytes(), EngineRecord)

    def log_of(self, engine: str) -> str:
        return self.record(engine).launch.log_file.read_text(errors="replace")

    def ask_engine(self, engine: str, path: str) -> Any:
        """Asks the engine itself, with the key that its agent made for it."""
        launch = self.record(engine).launch
        return httpx2.get(launch.url + path, headers={"Authorization": f"Bearer {launch.api_key}"}, timeout=10).json()

    def loads(self, engine: str) -> dict[str, Any]:
        found: dict[str, Any] = self.ask_engine(engine, "/v1/loads?include=core,disagg,queues,memory")["loads"][0]
        return found

    def held(self, engine: str) -> dict[str, int]:
        """Everything that an idle engine has none of."""
        loads = self.loads(engine)
        counts = {name: loads[name] for name in ("num_running_reqs", "num_waiting_reqs", "num_used_tokens")}
        queues = (
            {name: value for name, value in loads["disaggregation"].items() if name.endswith("_reqs")} if loads["disaggregation"] else {}
        )
        return {name: value for name, value in (counts | queues).items() if value}

    def wait_idle(self, *engines: str, limit_s: float) -> float:
        """Waits until nothing runs on these engines and no KV is held; returns the seconds that it took."""
        return wait_for(lambda: not any(self.held(e) for e in engines), lambda: str({e: self.held(e) for e in engines}), limit_s=limit_s)

    def order(self, verb: str, engine: str, **body: Any) -> dict[str, Any]:
        answer = httpx2.post(f"{self.admin}/admin/engines/{engine}/{verb}", json=body, timeout=30)
        assert answer.status_code in {200, 202}, answer.text
        found: dict[str, Any] = answer.json()
        return found

    @contextlib.contextmanager
    def without(self, *engines: str) -> Iterator[None]:
        """Requests go to the other engines meanwhile."""
        for engine in engines:
            self.order("drain", engine)
        try:
            yield
        finally:
            for engine in engines:
                self.order("undrain", engine)
            for engine in engines:
                self.wait_engine(engine, "ready")

    def change(self, number: int) -> dict[str, Any]:
        found: dict[str, Any] = httpx2.get(f"{self.admin}/admin/changes/{number}", timeout=10).json()
        return found

    def metric(self, name: str) -> float:
        """The sum of a metric over its labels."""
        lines = httpx2.get(self.admin + "/metrics", timeout=10).text.splitlines()
        return sum(float(line.rsplit(" ", 1)[1]) for line in lines if line.startswith((f"{name}{{", f"{name} ")))


@pytest.fixture(scope="session")
def sglang_python() -> Path:
    """The Python of scripts/install-sglang-cpu; without it these tests fail, because left out they would prove nothing."""
    try:
        return find_python("", "cpu", os.environ)[0]
    except StartError as error:
        pytest.fail(f"{error}; or leave these tests out with ./scripts/test --no-sglang")


@pytest.fixture(scope="session")
def cluster(tmp_path_factory: pytest.TempPathFactory, sglang_python: Path) -> Iterator[Cluster]:
    made = Cluster(tmp_path_factory.mktemp("sglang"))
    try:
        made.start_router()
        for name, role in (("p", "prefill"), ("d", "decode"), ("u", "unified")):
            made.start_host(name, role, *ENGINE, *PLAIN_JSON, *FEW_PLACES)
        wait_whole(made, START_LIMIT_S)
        yield made
    finally:
        made.close()


@pytest.fixture(autouse=True)
def whole_again(request: pytest.FixtureRequest) -> Iterator[None]:
    """Each test finds the three engines ready in their own roles, and leaves them so."""
    yield
    if "cluster" in request.fixturenames:
        wait_whole(request.getfixturevalue("cluster"), BACK_LIMIT_S)


def wait_whole(cluster: Cluster, limit_s: float) -> None:
    wanted = {"p": "prefill", "d": "decode", "u": "unified"}

    def is_whole() -> bool:
        return all((e := cluster.engine(name))["state"] == "ready" and e["role"] == role for name, role in wanted.items())

    wait_for(is_whole, lambda: json.dumps(cluster.cluster(), indent=1), limit_s)


def text_of(tokens: int, seed: int) -> list[int]:
    """A prompt as token ids of the demo model."""
    return prompt_ids(tokens, seed)


def until(condition: Callable[[], bool], limit_s: float) -> float:
    """Waits closely; returns the seconds that it took."""
    began = time.monotonic()
    while not condition():
        assert time.monotonic() - began < limit_s
        time.sleep(0.005)
    return time.monotonic() - began
