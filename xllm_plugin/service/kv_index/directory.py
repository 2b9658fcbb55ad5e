"""Follows the KV events of all instances, and answers who has how much of a prompt."""

from __future__ import annotations

import asyncio
import logging
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

import zmq.asyncio

from xllm_plugin.registration import KvEventSource
from xllm_plugin.service.config import KvIndexConfig
from xllm_plugin.service.fleet import Fleet, Instance
from xllm_plugin.service.kv_index.index import Cache, Held, PrefixIndex
from xllm_plugin.service.kv_index.places import Places
from xllm_plugin.service.kv_index.prompts import Prompt
from xllm_plugin.service.kv_index.subscriber import Follower, State, Subscriber

__all__ = ["KvDirectory"]

logger = logging.getLogger(__name__)

_LOOK_S: Final = 0.1
_MAX_PLACES: Final = 64
_NOTHING: Mapping[str, float] = {}


@dataclass(slots=True)
class _Followed:
    """One incarnation of one instance."""

    incarnation: str
    sources: tuple[KvEventSource, ...]
    followers: list[Follower]
    tasks: dict[Follower, asyncio.Task[None]]
    """Of those that can be followed."""


class KvDirectory:
    """Owns the index and its subscribers.

    Args:
        fleet: whose instances to follow.
        config: in force; replaced by a reload.
    """

    def __init__(self, fleet: Fleet, config: KvIndexConfig) -> None:
        self.config = config
        self.index = PrefixIndex()
        self._fleet = fleet
        self._followed: dict[Instance, _Followed] = {}
        self._places: OrderedDict[str | None, tuple[Sequence[Instance], Places]] = OrderedDict()
        """Model -> its candidates and theirs, of the models that were asked for last.

        Empty when who is followed has changed."""
        self._context = zmq.asyncio.Context()

    async def run(self) -> None:
        """Follow the fleet until cancelled."""
        try:
            while True:
                self._follow_fleet()
                await asyncio.sleep(_LOOK_S)
        finally:
            for instance in tuple(self._followed):
                self._leave(instance)
            self._context.destroy(linger=0)

    @property
    def is_useful(self) -> bool:
        """Whether any instance is known to hold anything."""
        return not self.index.is_empty

    def lookup(
        self, prompt: Prompt, model: str | None, candidates: Sequence[Instance]
    ) -> Mapping[str, float]:
        """Tokens of `prompt` that each of `candidates` need not compute; 0 where they are left out.

        A block in slower memory counts by its tier's weight.  Of several data-parallel ranks it is
        the mean, since the instance chooses among them without looking.
        """
        found = self.index.holders(*prompt)
        if not found:
            return _NOTHING
        return self._places_of(model, candidates).cached(found, self._weighted)

    def describe(self, instance: Instance) -> list[dict[str, Any]]:
        """What is known of an instance's ranks, for people."""
        followed = self._followed.get(instance)
        if followed is None:
            return []
        return [
            {
                "dp_rank": source.dp_rank,
                "state": follower.state.value,
                "reason": follower.reason,
                "num_blocks": sum(map(len, follower.cache.held)),
                "num_events": follower.num_events,
                "num_gaps": follower.num_gaps,
                "num_orphans": follower.cache.num_orphans,
            }
            for source, follower in zip(followed.sources, followed.followers, strict=True)
        ]

    def is_exact(self, instance: Instance) -> bool:
        """Whether all that it holds is known."""
        followed = self._followed.get(instance)
        return followed is not None and all(
            follower.state is State.LIVE for follower in followed.followers
        )

    def _places_of(self, model: str | None, candidates: Sequence[Instance]) -> Places:
        placed, places = self._places.get(model, ((), None))
        if places is None or placed is not candidates:
            places = Places([(one.name, self._caches_of(one)) for one in candidates])
            self._places[model] = candidates, places
            if len(self._places) > _MAX_PLACES:
                self._places.popitem(last=False)
        self._places.move_to_end(model)
        return places

    def _caches_of(self, instance: Instance) -> list[Cache]:
        followed = self._followed.get(instance)
        return [follower.cache for follower in followed.followers] if followed else []

    def _weighted(self, held: Held, block_size: int) -> float:
        config = self.config
        blocks = held.device + config.host_weight * held.host + config.disk_weight * held.disk
        return blocks * block_size

    def _follow_fleet(self) -> None:
        known = set(self._fleet)
        for instance in self._followed.keys() - known:
            self._leave(instance)
        for instance in known:
            published = instance.entry.kv_events or instance.kv_events
            sources = published if self.config.enabled else ()
            followed = self._followed.get(instance)
            is_same = followed is not None and (
                (followed.incarnation, followed.sources) == (instance.life.incarnation, sources)
            )
            if is_same:
                self._end_faulty(instance)
                continue
            if followed is not None:
                self._leave(instance)
            if sources:
                self._join(instance, sources)

    def _join(self, instance: Instance, sources: tuple[KvEventSource, ...]) -> None:
        self._places.clear()
        followed = _Followed(instance.life.incarnation, sources, [], {})
        self._followed[instance] = followed
        for source in sources:
            name = f"{instance.name}, rank {source.dp_rank}"
            follower = Follower(self.index, self.index.add(), name)
            subscriber = Subscriber(
                source,
                follower,
                replay_timeout_s=self.config.replay_timeout_s,
                context=self._context,
            )
            followed.followers.append(follower)
            followed.tasks[follower] = asyncio.create_task(subscriber.run())

    def _leave(self, instance: Instance) -> None:
        self._places.clear()
        followed = self._followed.pop(instance)
        for task in followed.tasks.values():
            task.cancel()
        for follower in followed.followers:
            follower.drop()

    def _end_faulty(self, instance: Instance) -> None:
        """A subscriber ends by a fault of ours: go on without it, and without what it knew."""
        followed = self._followed[instance]
        for follower, task in tuple(followed.tasks.items()):
            if not task.done():
                continue
            del followed.tasks[follower]
            error = task.exception()
            if error is not None:
                logger.error(
                    "following KV events of %s has failed; please report this",
                    instance.name,
                    exc_info=error,
                )
                follower.fail(f"a fault of this service, {type(error).__name__}: {error}")
