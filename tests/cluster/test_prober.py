"""What a look at an engine that cannot be had says."""

from __future__ import annotations

import pytest

from disagg.cluster.detector import Refused, TimedOut
from disagg.cluster.prober import Prober
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
