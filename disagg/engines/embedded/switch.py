"""May this engine change its role now? SGLang's ``POST /pd_role_switch``, decided.

Theory of operation. A switch is one moment in which nothing runs: the engine must hold no request, no page and no writer, because
a page that somebody still writes into would belong to a request of the new role a moment later. So the engine never waits for
itself to become idle; whoever asks drains it first and asks again when it was refused as busy. ``judge`` looks at the situation and
says what happens; the engine then does it before anything else can come in between.

What the answers mean, as SGLang 0.5.23 gives them: a refusal that left everything as it was says ``safe_to_restore: true``, the engine
may serve on in its old role; a switch that broke says false, and only a restart helps. A switch that was done says false too: there is
nothing to restore. Pure.
"""

from __future__ import annotations

from typing import NamedTuple

import msgspec

SWITCHABLE = ("prefill", "decode")


class SwitchBody(msgspec.Struct, frozen=True):
    """POST /pd_role_switch.

    Attributes:
        decode_cuda_graph_memory_gb: needed when the engine is to become decode for the first time; 0 is allowed. There are no graphs
            here, the demand is made so that a caller who forgets the field learns it before SGLang refuses it.
        decode_cuda_graph_bs: accepted, without effect.
        prepare_only: say whether it could be done, and do nothing.
    """

    new_role: str = ""
    decode_cuda_graph_memory_gb: float | None = None
    decode_cuda_graph_bs: list[int] | None = None
    prepare_only: bool = False


class Situation(NamedTuple):
    """What the decision depends on.

    Attributes:
        enabled: the engine was started with ``--enable-pd-role-switch``.
        role: now; ``null``, ``prefill`` or ``decode``.
        busy: what the engine still holds, in words; empty when it is idle.
        decoded_before: it is or was a decode engine, so that it asks for no graph memory again.
        broken: switches fail on purpose (the fault ``refuse-switch``).
    """

    enabled: bool
    role: str
    busy: str = ""
    decoded_before: bool = False
    broken: bool = False


class Switched(NamedTuple):
    """The answer, with SGLang's field names; 200 if ``success``, else 400."""

    success: bool
    message: str
    old_role: str
    new_role: str
    safe_to_restore: bool = False


def judge(body: SwitchBody, situation: Situation) -> Switched:
    """What the engine answers. ``flips`` says whether it also has something to do."""
    refusal = "" if situation.broken else _refusal(body, situation)
    if situation.broken or refusal:
        message = refusal or "role switch failed; instance unhealthy, restart required: --faults refuse-switch"
        return Switched(success=False, message=message, old_role=situation.role, new_role=body.new_role, safe_to_restore=bool(refusal))
    ready = body.prepare_only and body.new_role != situation.role
    return Switched(
        success=True,
        message="ready" if body.prepare_only else "ok",
        old_role=situation.role,
        new_role=body.new_role,
        safe_to_restore=ready,
    )


def flips(body: SwitchBody, answer: Switched) -> bool:
    """Whether the role is to change now."""
    return answer.success and not body.prepare_only and answer.new_role != answer.old_role


def _refusal(body: SwitchBody, situation: Situation) -> str:
    """Why not, or nothing. The order is SGLang's, so that the same caller sees the same sentence first."""
    if not situation.enabled:
        return "--enable-pd-role-switch is not set on this engine: start it with the flag"
    if body.new_role not in SWITCHABLE:
        return f"invalid new_role={body.new_role[:32]!r}: allowed are prefill and decode"
    if situation.role not in SWITCHABLE:
        return "the engine is not running in PD disaggregation mode: it was started unified (null), and such an engine keeps its role"
    if body.new_role == situation.role:
        return ""
    if situation.busy:
        return f"the engine is not idle ({situation.busy}); drain all requests before switching"
    return _graph_refusal(body.decode_cuda_graph_memory_gb) if body.new_role == "decode" and not situation.decoded_before else ""


def _graph_refusal(memory_gb: float | None) -> str:
    if memory_gb is None:
        return "decode_cuda_graph_memory_gb is required before capturing decode graphs: send 0 where there is nothing to capture"
    return "" if memory_gb >= 0 else "decode_cuda_graph_memory_gb must be non-negative"
