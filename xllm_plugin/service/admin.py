"""The admin port: see and steer the service, register instances, reach their control routes.

`/health`, `/metrics` and the files of the dashboard are open; everything else takes
`Authorization: Bearer TOKEN`.
"""

from __future__ import annotations

import hmac
from collections.abc import Awaitable, Callable
from dataclasses import asdict
from typing import Any

import aiohttp
import msgspec
import prometheus_client
from aiohttp import web
from pydantic import ValidationError

from xllm_plugin.errors import MisuseError, NotNowError
from xllm_plugin.registration import Heartbeat, Lease, Registration
from xllm_plugin.service.dashboard import pages
from xllm_plugin.service.dashboard.overview import overview
from xllm_plugin.service.fleet import Instance
from xllm_plugin.service.flow.metrics import describe_keys, describe_queue
from xllm_plugin.service.metrics import ServiceCollector
from xllm_plugin.service.proxy import Proxy
from xllm_plugin.service.registry import Registrations
from xllm_plugin.service.replies import error_body
from xllm_plugin.service.routes import is_control

__all__ = ["AdminApi"]

_OPEN = frozenset({"/health", "/metrics"}) | pages.PATHS
_REGISTRATIONS = "/v1/registrations"
_MAX_BODY_BYTES = 2**20
_MAX_DIGITS = 15


class AdminApi:
    """Handlers of the admin port.

    Args:
        proxy: what is seen and steered.
        registrations: takes instances in, and lets them drain.
        session: for control routes of instances.
        token: what callers show.
    """

    def __init__(
        self,
        proxy: Proxy,
        registrations: Registrations,
        session: aiohttp.ClientSession,
        token: str,
    ) -> None:
        self._proxy = proxy
        self._registrations = registrations
        self._session = session
        self._token = token
        self._metrics = prometheus_client.CollectorRegistry()
        self._metrics.register(ServiceCollector(proxy, registrations))
        prometheus_client.ProcessCollector(registry=self._metrics)

    def application(self) -> web.Application:
        """An aiohttp application of all routes."""
        application = web.Application(middlewares=[self._guard], client_max_size=_MAX_BODY_BYTES)
        application.add_routes(
            [
                web.get("/health", self._health),
                web.get("/metrics", self._exposition),
                *pages.routes(),
                web.get("/v1/overview", self._overview),
                web.get("/v1/instances", self._instances),
                web.post("/v1/instances/{name}/drain", self._drain),
                web.post("/v1/instances/{name}/undrain", self._undrain),
                web.route("*", "/v1/instances/{name}/control/{route:.+}", self._control),
                web.get("/v1/decisions", self._decisions),
                web.get("/v1/config", self._config),
                web.get("/v1/queue", self._queue),
                web.get("/v1/keys", self._keys),
                web.post(_REGISTRATIONS, self._register),
                web.post(f"{_REGISTRATIONS}/{{name}}/heartbeat", self._heartbeat),
                web.delete(f"{_REGISTRATIONS}/{{name}}", self._deregister),
            ]
        )
        return application

    # -- who may ask ----------------------------------------------------------------------------

    @web.middleware
    async def _guard(
        self,
        request: web.Request,
        handler: Callable[[web.Request], Awaitable[web.StreamResponse]],
    ) -> web.StreamResponse:
        if request.path not in _OPEN and not self._is_allowed(request):
            return _error(401, "Send `Authorization: Bearer TOKEN` with the right token.")
        try:
            return await handler(request)
        except web.HTTPException as error:
            return _error(error.status, f"{request.method} {request.path}: {error.reason}.")
        except ValidationError as error:
            return _error(400, "; ".join(_line(item) for item in error.errors()))
        except MisuseError as error:
            return _error(409, str(error))
        except NotNowError as error:
            return _error(503, str(error))

    def _is_allowed(self, request: web.Request) -> bool:
        expected = self._token
        if request.path.startswith(_REGISTRATIONS):
            registration = self._proxy.config.instances.registration_token
            if registration is None:
                return False
            expected = registration.get_secret_value()
        given = request.headers.get("Authorization", "").removeprefix("Bearer ")
        # aiohttp keeps bytes that are not UTF-8 as surrogates.
        return hmac.compare_digest(given.encode("utf-8", "surrogateescape"), expected.encode())

    # -- see ------------------------------------------------------------------------------------

    async def _health(self, _: web.Request) -> web.Response:
        states = [instance.life.state.value for instance in self._proxy.fleet]
        counts = {state: states.count(state) for state in sorted(set(states))}
        registry = self._registrations.describe().get("state", "ok")
        health: dict[str, Any] = {"status": "ok", "instances": counts, "registry": registry}
        if workers := self._proxy.workers:
            health["workers"] = {"up": sum(one.is_up for one in workers), "of": len(workers)}
        return web.json_response(health)

    async def _exposition(self, _: web.Request) -> web.Response:
        return web.Response(
            body=prometheus_client.generate_latest(self._metrics),
            headers={"Content-Type": prometheus_client.CONTENT_TYPE_LATEST},
        )

    async def _instances(self, _: web.Request) -> web.Response:
        now_s = self._proxy.fleet.clock()
        found = [self._described(instance, now_s) for instance in self._proxy.fleet]
        return web.json_response({"instances": found, "registry": self._registrations.describe()})

    async def _decisions(self, _: web.Request) -> web.Response:
        decisions = [decision.described() for decision in self._proxy.router.decisions]
        return web.json_response({"decisions": decisions})

    async def _overview(self, request: web.Request) -> web.Response:
        since = request.query.get("since", "0")
        if not since.isdecimal() or len(since) > _MAX_DIGITS:
            return _error(400, f"since={since!r}: give the `next` of an earlier answer.")
        # About 3 ms for 100 instances and an hour of samples.
        body = msgspec.json.encode(overview(self._proxy, int(since)))
        return web.Response(body=body, content_type="application/json")

    async def _config(self, _: web.Request) -> web.Response:
        return web.json_response(self._proxy.config.model_dump(mode="json"))

    async def _queue(self, _: web.Request) -> web.Response:
        return web.json_response({"queue": describe_queue(self._proxy.flow)})

    async def _keys(self, _: web.Request) -> web.Response:
        return web.json_response({"keys": describe_keys(self._proxy)})

    # -- steer ----------------------------------------------------------------------------------

    async def _drain(self, request: web.Request) -> web.Response:
        instance = self._named(request)
        await self._registrations.drain(instance)
        return self._shown(instance)

    async def _undrain(self, request: web.Request) -> web.Response:
        instance = self._named(request)
        await self._registrations.undrain(instance)
        return self._shown(instance)

    def _shown(self, instance: Instance) -> web.Response:
        return web.json_response(self._described(instance, self._proxy.fleet.clock()))

    async def _control(self, request: web.Request) -> web.Response:
        instance = self._named(request)
        path = "/" + request.match_info["route"]
        if not is_control(path):
            return _error(
                400, f"{path} is no control route; send requests to the service's public port."
            )
        headers = {}
        for name in ("Content-Type", "X-Instance-Authorization"):
            if name in request.headers:
                headers[name.removeprefix("X-Instance-")] = request.headers[name]
        key = self._proxy.config.instances.api_key
        if key is not None:
            headers.setdefault("Authorization", f"Bearer {key.get_secret_value()}")
        try:
            async with self._session.request(
                request.method,
                instance.entry.url.rstrip("/") + path,
                params=request.query,
                data=await request.read(),
                headers=headers,
                allow_redirects=False,
            ) as reply:
                return web.Response(
                    status=reply.status,
                    body=await reply.read(),
                    content_type=reply.content_type,
                )
        except (aiohttp.ClientError, OSError) as error:
            return _error(502, f"Instance {instance.name}: {error}.")

    def _described(self, instance: Instance, now_s: float) -> dict[str, Any]:
        directory = self._proxy.directory
        found = directory.describe(instance) if directory else []
        return {**_described(instance, now_s), "kv_index": found}

    def _named(self, request: web.Request) -> Instance:
        name = request.match_info["name"]
        instance = self._proxy.fleet.get(name)
        if instance is None:
            known = ", ".join(one.name for one in self._proxy.fleet) or "none"
            raise web.HTTPNotFound(reason=f"no instance {name!r}, known are {known}")
        return instance

    # -- registrations --------------------------------------------------------------------------

    async def _register(self, request: web.Request) -> web.Response:
        asked = Registration.model_validate_json(await request.read())
        return self._leased(await self._registrations.register(asked))

    async def _heartbeat(self, request: web.Request) -> web.Response:
        beat = Heartbeat.model_validate_json(await request.read())
        name = request.match_info["name"]
        return self._leased(await self._registrations.heartbeat(name, beat))

    async def _deregister(self, request: web.Request) -> web.Response:
        incarnation = request.query.get("incarnation", "")
        await self._registrations.deregister(request.match_info["name"], incarnation)
        return web.json_response({})

    def _leased(self, instance: Instance) -> web.Response:
        lease = Lease(
            name=instance.name,
            lease_s=instance.lease_s or self._proxy.fleet.timings.lease_s,
            in_flight=self._registrations.in_flight(instance),
        )
        return web.json_response(lease.model_dump())


def _described(instance: Instance, now_s: float) -> dict[str, Any]:
    life = instance.life
    return {
        "name": instance.name,
        "url": instance.entry.url,
        "source": instance.source,
        "state": life.state.value,
        "reason": life.reason,
        "state_age_s": round(now_s - life.since_s, 3),
        "seen_age_s": round(now_s - life.seen_s, 3),
        "incarnation": life.incarnation,
        "models": sorted(instance.models),
        "capacity": instance.capacity,
        "in_flight": instance.in_flight,
        "offline_requests": instance.offline_requests,
        "outstanding_tokens": instance.outstanding_tokens,
        "foreign_requests": instance.foreign_requests,
        "role": instance.entry.role.value,
        "continues": instance.continues,
        "load": instance.load.model_dump() if instance.load else None,
        "reported": instance.reported,
        "speed": asdict(instance.speed),
        "prefill_tokens": round(instance.prefill_tokens),
        "idle_connections": instance.num_idle_connections,
        "errors": instance.stats.errors,
        "retries": instance.stats.retries,
        "resumes": instance.stats.resumes,
        "hedges": instance.stats.hedges,
    }


def _line(item: Any) -> str:
    name = ".".join(str(part) for part in item["loc"])
    return f"{name}: {item['msg']}"


def _error(status: int, message: str) -> web.Response:
    return web.Response(
        status=status, body=error_body(status, message), content_type="application/json"
    )
