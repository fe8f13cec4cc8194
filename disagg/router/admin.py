"""The admin listener: metrics, what the router knows, and what people order. On loopback unless configured."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Collection, Sequence
from http import HTTPStatus
from typing import Any, Protocol

import msgspec
from aiohttp import web

from disagg.errors import DisaggError, OrderError, RequestError
from disagg.model import ClusterView, EngineId, EngineView, Role
from disagg.observe.metrics import RouterMetrics
from disagg.policy.books import Books
from disagg.policy.cost import CHANGED_S, ENOUGH, SHIFT
from disagg.policy.holds import Hold
from disagg.policy.prefix import PrefixIndex, Standing
from disagg.router.openai import error_object
from disagg.router.relay import Relay

Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]
CAUSE_LIMIT = 200


class Orders(Protocol):
    """What people may order. Every method says in one sentence what happens, or raises DisaggError with the reason."""

    async def drain(self, engine: str, cause: str) -> str:
        """No new work."""

    async def undrain(self, engine: str, cause: str) -> str:
        """Work again."""

    def flip(self, engine: str, role: Role, cause: str) -> int:
        """Another role; returns the number of the change."""

    def restart(self, engine: str, cause: str) -> int:
        """A new process; returns the number of the change."""

    def change(self, number: int) -> dict[str, Any]:
        """How a change fares."""

    def beware(self, engine: str) -> str:
        """What a person should know before this engine is taken out: empty, or a clause."""

    def story(self, engine: str) -> list[tuple[float, str]]:
        """What happened to an engine."""

    def hosts(self) -> Sequence[msgspec.Struct]:
        """Everybody who is registered."""

    async def revoke(self, host: str) -> str:
        """Shuts a host out."""

    def kv_accounts(self, holds: Sequence[Hold]) -> Sequence[msgspec.Struct]:
        """The KV pool of every engine, and what of it no entry explains."""

    def reaped(self) -> int:
        """Requests that no entry explained and that are gone."""

    def reap(self, engine: str | None) -> Sequence[str]:
        """Aborts what no entry explains, now; what it does, one sentence each."""


class _OrderBody(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    role: Role | None = None
    cause: str = "it was ordered over the admin listener"


def admin_app(
    *,
    view: Callable[[], ClusterView],
    why_not_ready: Callable[[], str],
    prefixes: PrefixIndex,
    relay: Relay,
    standings: Callable[[], Sequence[msgspec.Struct]],
    measuring: Callable[[], Collection[EngineId]],
    metrics: RouterMetrics,
    orders: Orders,
) -> web.Application:
    """The aiohttp application.

    Args:
        view: what the router knows of its engines.
        why_not_ready: why no request can be served, one sentence; empty when they can.
        prefixes: what engines say of their prefix caches.
        relay: whose requests and holds are shown.
        standings: how the pools of each model stand.
        measuring: the engines that are being measured.
        metrics: what is counted.
        orders: who takes orders.
    """
    app = web.Application(middlewares=[_guard], client_max_size=64 * 1024)
    _Looks(view, why_not_ready, prefixes, relay, standings, measuring, metrics, orders).route(app)
    _Doings(orders).route(app)
    return app


class _Looks:
    """What changes nothing."""

    def __init__(
        self,
        view: Callable[[], ClusterView],
        why_not_ready: Callable[[], str],
        prefixes: PrefixIndex,
        relay: Relay,
        standings: Callable[[], Sequence[msgspec.Struct]],
        measuring: Callable[[], Collection[EngineId]],
        metrics: RouterMetrics,
        orders: Orders,
    ) -> None:
        self._view = view
        self._why_not_ready = why_not_ready
        self._prefixes = prefixes
        self._relay = relay
        self._standings = standings
        self._measuring = measuring
        self._metrics = metrics
        self._orders = orders

    def route(self, app: web.Application) -> None:
        add = app.router.add_get
        add("/metrics", self._get_metrics)
        add("/admin/cluster", self._get_cluster)
        add("/admin/requests", self._get_requests)
        add("/admin/requests/{id}", self._get_request)
        add("/admin/engines/{id}", self._get_engine)
        add("/admin/hosts", self._get_hosts)
        add("/admin/kv", self._get_kv)
        add("/admin/ab", self._get_ab)
        add("/admin/changes/{number:[0-9]{1,9}}", self._get_change)

    async def _get_metrics(self, _: web.Request) -> web.Response:
        return web.Response(body=self._metrics.text(), headers={"Content-Type": "text/plain; version=0.0.4; charset=utf-8"})

    async def _get_cluster(self, _: web.Request) -> web.Response:
        metrics, why = self._metrics, self._why_not_ready()
        requests = {"inflight": metrics.inflight, "waiting": metrics.waiting(), "sent_away": metrics.shed.total()}
        view, books, now = self._view(), self._relay.admission.books, self._relay.clock()
        cluster = cluster_json(view, self._prefixes)
        for row, engine in zip(cluster["engines"], view.engines, strict=True):
            row["forecast"] = forecast_json(books, engine, view, now)
            if engine.id in self._measuring():
                row["measuring"] = True
            distrusted = [said for said in (engine.distrust, books.contradictions.doubt(engine.slot, now=now)) if said]
            if distrusted:
                row["distrusted"] = distrusted
        standings = [rounded(msgspec.to_builtins(standing)) for standing in self._standings()]
        pools = view.pools
        alone = {model: tokens for model, pool in pools.items() if (tokens := books.unified_up_to(pool, now=now)) is not None}
        more = {"unified_up_to_tokens": alone} if alone else {}
        more |= {"ab": self._compared()} if self._relay.admission.compares else {}
        return _json({**cluster, "ratio": standings, **more, "requests": requests, "ready": not why, "reason": why})

    async def _get_requests(self, _: web.Request) -> web.Response:
        records = reversed(self._relay.records.values())
        return _json({"requests": [{"id": r.request_id, "route": r.route, "model": r.model, "outcome": r.outcome} for r in records]})

    async def _get_request(self, request: web.Request) -> web.Response:
        story = self._relay.waterfall(request.match_info["id"])
        return _error(404, "no such request: the last 1000 are kept") if story is None else _json(story)

    async def _get_engine(self, request: web.Request) -> web.Response:
        name = request.match_info["id"]
        story = [{"at_s": round(at, 3), "what": what} for at, what in self._orders.story(name)]
        row = next(e for e in cluster_json(self._view(), self._prefixes)["engines"] if e["id"] == name)
        return _json({**row, "story": story})

    async def _get_hosts(self, _: web.Request) -> web.Response:
        return _json({"hosts": self._orders.hosts()})

    async def _get_kv(self, _: web.Request) -> web.Response:
        holds = self._relay.holds(self._relay.clock())
        return _json({"holds": holds, "engines": self._orders.kv_accounts(holds), "reaped": self._orders.reaped()})

    async def _get_ab(self, _: web.Request) -> web.Response:
        return _json(self._compared())

    def _compared(self) -> dict[str, Any]:
        comparison = self._relay.admission.books.comparison
        return {"arms": rounded(msgspec.to_builtins(comparison.rows())), "verdict": comparison.verdict()}

    async def _get_change(self, request: web.Request) -> web.Response:
        return _json(self._orders.change(int(request.match_info["number"])))


class _Doings:
    """What changes something; each answers with what will happen and why."""

    def __init__(self, orders: Orders) -> None:
        self._orders = orders

    def route(self, app: web.Application) -> None:
        add = app.router.add_post
        for verb in ("drain", "undrain", "flip", "restart"):
            add(f"/admin/engines/{{id}}/{verb}", getattr(self, f"_{verb}"))
        add("/admin/hosts/{name}/revoke", self._revoke)
        add("/admin/kv/reap", self._reap)

    async def _drain(self, request: web.Request) -> web.Response:
        body = await _body(request)
        return _json({"will": await self._orders.drain(request.match_info["id"], body.cause), "why": body.cause})

    async def _undrain(self, request: web.Request) -> web.Response:
        body = await _body(request)
        return _json({"will": await self._orders.undrain(request.match_info["id"], body.cause), "why": body.cause})

    async def _flip(self, request: web.Request) -> web.Response:
        body = await _body(request)
        if body.role is None:
            raise RequestError('say which role it shall have: {"role": "prefill"} or {"role": "decode"}', param="role")
        engine = request.match_info["id"]
        beware = self._orders.beware(engine)
        number = self._orders.flip(engine, body.role, body.cause)
        will = f"{engine} drains, switches live to {body.role}, answers canaries if a partner is there, and is back in service;"
        will += " else it is started anew"
        will += beware
        return _json({"will": will, "why": body.cause, "change": number}, status=202)

    async def _restart(self, request: web.Request) -> web.Response:
        body = await _body(request)
        engine = request.match_info["id"]
        number = self._orders.restart(engine, body.cause)
        return _json({"will": f"{engine} drains, its process ends and a new one starts", "why": body.cause, "change": number}, status=202)

    async def _revoke(self, request: web.Request) -> web.Response:
        return _json({"will": await self._orders.revoke(request.match_info["name"])})

    async def _reap(self, request: web.Request) -> web.Response:
        body = await _body(request)
        done = self._orders.reap(request.query.get("engine"))
        return _json({"will": "; ".join(done) or "nothing: an entry explains every request on every engine asked about", "why": body.cause})


async def _body(request: web.Request) -> _OrderBody:
    text = await request.read()
    try:
        body = msgspec.json.decode(text, type=_OrderBody) if text else _OrderBody()
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise RequestError(f"the body must be a JSON object with `role` or `cause`: {error}") from error
    return msgspec.structs.replace(body, cause=body.cause[:CAUSE_LIMIT])


@web.middleware
async def _guard(request: web.Request, handler: Handler) -> web.StreamResponse:
    if request.method != "GET" and "Origin" in request.headers:
        return _error(403, "orders are not taken from web pages: a page that somebody opened on this machine could send them, too")
    try:
        return await handler(request)
    except DisaggError as error:
        return _error(error.status, str(error))
    except web.HTTPException as error:
        return _error(error.status, f"{request.method} {request.path[:200]}: {error.reason}")


def _json(content: Any, status: int = 200) -> web.Response:
    return web.Response(body=msgspec.json.encode(content), status=status, content_type="application/json")


def _error(status: int, sentence: str) -> web.Response:
    kind = "invalid_request_error" if status < 500 else "internal_error"
    body = msgspec.json.encode(error_object(sentence, kind=kind))
    return web.Response(status=status, reason=HTTPStatus(status).phrase, body=body, content_type="application/json")


def cluster_json(view: ClusterView, prefixes: PrefixIndex) -> dict[str, Any]:
    """Hosts, engines and pairs in the shape of ``GET /admin/cluster``."""
    engines = [
        {
            "id": e.id,
            "host": e.host or e.address.host,
            "role": e.address.role.value,
            "state": e.state.value,
            "model": e.facts.model,
            "url": e.address.url if e.address.port else "",
            "pid": e.address.pid or None,
            "load": {
                "running": e.load.running,
                "waiting": e.load.waiting,
                "kv_used_tokens": e.load.kv_used_tokens,
                "kv_total_tokens": e.load.kv_total_tokens,
                "kv_quarantined_tokens": e.load.kv_quarantined_tokens,
            },
            **({"weight": round(e.weight, 2)} if e.weight > 1.0 else {}),
            "reason": f"{e.reason}, but {e.unpaired}" if e.unpaired else e.reason,
            **_cache_json(prefixes.standing(e.id)),
        }
        for e in view.engines
    ]
    joined = [
        {"id": h.id, "state": h.state.value, "reason": h.reason, "release": h.release, "incarnation": h.incarnation} for h in view.hosts
    ]
    given = [{"id": name} for name in sorted({e.address.host for e in view.engines if not e.host})]
    bad = [{"prefill": p, "decode": d, "reason": reason} for (p, d), reason in view.quarantined.items()]
    cut = [{"prefill": p, "decode": d, "reason": reason} for (p, d), reason in view.cut.items()]
    return {"hosts": joined + given, "engines": engines, "quarantined": bad, "cut": cut}


def forecast_json(books: Books, engine: EngineView, view: ClusterView, now: float) -> dict[str, Any] | None:
    """What is known of how long an engine takes; None before it was in any view that requests saw.

    The links of one that reads say what each prompt, and each of its tokens, takes more than over its fastest link, seconds.
    """
    if engine.slot >= books.forecast.engines:
        return None
    known = books.forecast.known(engine.slot, now=now)
    lines = {Role.PREFILL: ("reads",), Role.DECODE: ("steps",), Role.UNIFIED: ("reads", "steps")}[engine.address.role]
    shown: dict[str, Any] = {"backlog_s": known.backlog_s}
    for name in lines:
        trust = getattr(known, f"{name}_trust")
        shown[name] = {"line": getattr(known, name), "samples": trust.samples, "error": trust.error, "doubt": trust.doubt}
        if trust.own and trust.samples < ENOUGH:
            shown[name]["restarted"] = True
        if now - trust.changed_at < CHANGED_S and not 1 / SHIFT < trust.changed < SHIFT:
            shown[name]["changed"] = {"times": trust.changed, "ago_s": now - trust.changed_at}
    if engine.address.role is Role.PREFILL:
        names = {e.slot: e.id for e in view.engines}
        links = books.forecast.links(engine.slot).items()
        shown["links"] = {names[slot]: {"rtt_s": rtt_s, "token_s": token_s} for slot, (rtt_s, token_s) in links if slot in names}
    return rounded(shown)  # type: ignore[no-any-return]


def rounded(content: Any) -> Any:
    """The same with numbers of four digits: more are noise, and nobody reads them."""
    if isinstance(content, float):
        return float(f"{content:.4g}")
    if isinstance(content, dict):
        return {key: rounded(value) for key, value in content.items()}
    return [rounded(value) for value in content] if isinstance(content, list | tuple) else content


def _cache_json(standing: Standing | None) -> dict[str, Any]:
    """Only engines that publish what their prefix cache holds have one to show."""
    if standing is None:
        return {}
    routing = "exact for token ids" if standing.known else "guessed from what it was sent"
    return {"cache": {**msgspec.to_builtins(standing), "routing": routing}}


def no_control_plane() -> OrderError:
    """What a router answers to orders that need one."""
    return OrderError("this router has no control plane: no host can join it", status=409)
