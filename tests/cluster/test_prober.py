"""What a look at an engine that cannot be had says."""

from __future__ import annotations

import pytest

from disagg.cluster.detector import Refused, TimedOut
from disagg.cluster.prober import Prober, read_bootstrap_port, read_facts
from disagg.model import EngineAddress, EngineId, Role
from tests.ports import free_port


@pytest.mark.parametrize(("host", "kind"), [("127.0.0.1", Refused), ("255.255.255.255", TimedOut)])
async def test_only_the_engines_own_machine_can_refuse(host: str, kind: type) -> None:
    """Nobody can be connected at the broadcast address: the kernel says at once that the network cannot be reached."""
    prober = Prober(2.0)
    try:
        seen = await prober.look(EngineAddress(EngineId("d1"), Role.DECODE, host, free_port()))
    finally:
        await prober.close()
    assert isinstance(seen, kind)
    assert isinstance(seen, Refused) or "unreachable" in seen.why  # type: ignore[union-attr]


@pytest.mark.parametrize(("said", "port"), [(8998, 8998), (65535, 65535), (0, 0), (65536, 0), (-1, 0), ("8998", 0), (True, 0), (None, 0)])
def test_only_a_port_is_taken_for_a_bootstrap_port(said: object, port: int) -> None:
    assert read_bootstrap_port({"disaggregation_bootstrap_port": said}) == port


def test_an_engine_whose_streams_carry_token_ids_must_say_so() -> None:
    """SGLang does not, and neither does what is no plain yes."""
    models = {"data": [{"id": "m"}]}
    assert read_facts(models, {"stream_token_ids": True})[0].stream_token_ids
    assert not any(read_facts(models, info)[0].stream_token_ids for info in ({}, {"stream_token_ids": False}, {"stream_token_ids": "yes"}))
