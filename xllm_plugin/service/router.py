"""Which instance gets a request, and why."""

from __future__ import annotations

import logging
from collections import OrderedDict, deque
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Final

from xllm_plugin.service.decision import Asked, Decision, Sent
from xllm_plugin.service.fleet import Fleet, Instance
from xllm_plugin.service.lifecycle import State
from xllm_plugin.service.policy import Choice, RoutingPolicy, Slo
from xllm_plugin.service.ranking import check_choice
from xllm_plugin.service.replies import Refusal, unknown_model
from xllm_plugin.service.roster import MANY, Roster
from xllm_plugin.service.routes import Kind
from xllm_plugin.service.speed import Speed

if TYPE_CHECKING:
    import asyncio

    from xllm_plugin.service.exchange import Exchange

__all__ = ["Router"]

logger = logging.getLogger(__name__)

_MAX_OWNERS: Final = 65536
_MAX_CAUSES: Final = 256
_MAX_ROSTERS: Final = 8
"""Each is told of every change; those of the models that were asked for last are kept."""
_TICKS_PER_S: Final = 1000
"""How finely it is told apart when prompts are predicted to be computed: a timer for each tick."""
_BYTES_PER_TOKEN: Final = 4  # as an exchange estimates its cost_tokens
_MAX_PROMPT_TOKENS: Final = 100_000
_INFINITE: Final = float("inf")


_NOTHING: Final = Sent()


class Router:
    """Owns the policy in force, the last decisions and who made which response.

    Args:
        fleet: the instances.
        policy: how to choose.
        num_decisions: how many to remember.
        retry_after_s: told to clients when there is no instance.
        clock: seconds since the epoch.
    """

    def __init__(
        self,
        fleet: Fleet,
        policy: RoutingPolicy,
        *,
        num_decisions: int,
        retry_after_s: float,
        clock: Callable[[], float],
    ) -> None:
        self.fleet = fleet
        self.policy = policy
        self.retry_after_s = retry_after_s
        self.has_room: Callable[[Instance], bool] | None = None
        """With flow control: instances without room are chosen if no other is left."""
        self.tell_owner: Callable[[str, str], None] | None = None
        """Takes a response and the name of who made it to other processes, if there are any."""
        self.decisions: deque[Decision] = deque(maxlen=num_decisions)
        self.causes: dict[tuple[str, str], int] = {}
        """(policy, cause) -> how many decisions since the start."""
        self._clock = clock
        self._sequence = 0
        self._owners: OrderedDict[str, str] = OrderedDict()
        self._rosters: OrderedDict[str | None, Roster] = OrderedDict()
        self._predicted: dict[int, list[Sent]] = {}
        """By the tick in which their prompts are predicted to be computed."""

    def choose(self, request: Exchange, among: Sequence[Instance] | None = None) -> Instance:
        """The instance for `request`, none of those that it has tried.

        Args:
            request: which has tried one, if `among` is given.
            among: candidates of these alone.

        Raises:
            Refusal: there is none, with what the client is to do.
        """
        candidates = self.fleet.candidates(request.model)
        if not candidates:
            raise self._none_for(request.model)
        if among is not None:
            candidates = among
        if request.response_id:
            owner = self._owner(request.response_id)
            if owner is not None and owner not in request.tried:
                if request.body:
                    self._send(request, self._asked(request), owner)
                choice = Choice(0, "made this response", "owner")
                return self._decided(request, owner, "owner", choice, 1)
        if request.model is None and request.route.kind is Kind.INFERENCE:
            self._require_one_model()
        request.sequence = self._sequence
        self._sequence += 1
        asked = self._asked(request)
        choice, instance, num_candidates = self._ask_policy(request, asked, candidates)
        self._send(request, asked, instance)
        return self._decided(request, instance, self.policy.name, choice, num_candidates)

    def first_byte(self, request: Exchange, *, is_measure: bool) -> None:
        """An answer begins: its prompt is computed.

        Args:
            request: whose answer it is.
            is_measure: whether the time since it was sent is that of its prompt and those before.
        """
        sent = request.sent
        if sent is None or sent.instance is None:
            return
        if is_measure:
            num_tokens = sent.ahead_tokens + sent.uncached_tokens
            seconds = request.proxy.loop.time() - request.sent_s
            self.fleet.observe_ttft(sent.instance, num_tokens, seconds)
        self._computed(sent)

    def left(self, request: Exchange) -> None:
        """A request no longer runs where it was sent."""
        if request.sent is not None:
            self._computed(request.sent)

    def no_instance(self, why: str) -> Refusal:
        """503: the request was right, the moment was not."""
        return Refusal(
            503, f"No instance can take this request now: {why}.", retry_after_s=self.retry_after_s
        )

    def owner_of(self, response_id: str) -> str:
        """Name of the instance that made this response; empty if that is not known."""
        return self._owners.get(response_id, "")

    def remember_owner(self, response_id: str, instance: Instance) -> None:
        """Later requests about this response go to `instance`."""
        if self.tell_owner is not None:
            self.tell_owner(response_id, instance.name)
        self._owners[response_id] = instance.name
        self._owners.move_to_end(response_id)
        if len(self._owners) > _MAX_OWNERS:
            self._owners.popitem(last=False)

    @property
    def num_routed(self) -> int:
        """Requests for which the policy was asked, each attempt counted."""
        return self._sequence

    def forget_rosters(self) -> None:
        """Who has room is to be found out anew: limits have changed."""
        for model in tuple(self._rosters):
            self._forget_roster(model)

    @staticmethod
    def _asked(request: Exchange) -> Asked:
        sent = request.sent or _NOTHING
        estimated = min(len(request.body) // _BYTES_PER_TOKEN, _MAX_PROMPT_TOKENS)
        slo = request.wishes.slo
        return Asked(
            request.sequence,
            request.draw,
            request.session_key,
            request.cost_tokens,
            sent.prompt_tokens or estimated,
            max(1, request.cost_tokens - estimated),
            sent.cached_tokens,
            None if slo is None else _left_of(slo, request),
        )

    def _send(self, request: Exchange, asked: Asked, instance: Instance) -> None:
        """Count the prompt among those that the instance has to compute."""
        cached = asked.cached_tokens.get(instance.name, 0.0)
        request.sent = sent = Sent(
            asked.prompt_tokens,
            asked.cached_tokens,
            instance,
            uncached_tokens=max(1, round(asked.prompt_tokens - cached)),
            ahead_tokens=instance.prefill_tokens,
            is_exact=request.sent is not None and request.sent.is_exact,
        )
        if not request.wants_stream:
            # Its first byte is its last: when its prompt is computed can only be predicted.
            self._predict(sent, instance.speed, request.proxy.loop)
        self.fleet.expect_prefill(instance, sent.uncached_tokens)

    def _predict(self, sent: Sent, speed: Speed, loop: asyncio.AbstractEventLoop) -> None:
        """Have its prompt taken for computed when it is likely to be."""
        num_tokens = sent.ahead_tokens + sent.uncached_tokens
        now_s = loop.time()
        computed_s = now_s + speed.ttft_base_s + speed.prefill_s_per_token * num_tokens
        tick = int(computed_s * _TICKS_PER_S) + 1
        together = self._predicted.get(tick)
        if together is not None:
            together.append(sent)
            return
        self._predicted[tick] = [sent]
        loop.call_later(tick / _TICKS_PER_S - now_s, self._tick_over, tick)

    def _tick_over(self, tick: int) -> None:
        for sent in self._predicted.pop(tick):
            self._computed(sent)

    def _computed(self, sent: Sent) -> None:
        if sent.instance is not None:
            self.fleet.expect_prefill(sent.instance, -sent.uncached_tokens)
            sent.instance = None

    def _ask_policy(
        self, request: Exchange, asked: Asked, candidates: Sequence[Instance]
    ) -> tuple[Choice, Instance, int]:
        """The choice, whom it means, and among how many."""
        policy, tried = self.policy, request.tried
        if tried:
            candidates = [one for one in candidates if one not in tried]
            if not candidates:
                raise self.no_instance("every instance was tried")
        try:
            found: tuple[Choice, int] | None = None
            if len(candidates) >= MANY and not tried and self._ranks():
                found = self._roster(request.model, candidates).choose(asked)
            else:
                if self._rosters and not tried:
                    self._forget_roster(request.model)
                if self.has_room is not None:
                    candidates = [one for one in candidates if self.has_room(one)] or candidates
            choice, num_open = found or (policy.choose(asked, candidates), len(candidates))
            check_choice(choice, len(candidates))
            return choice, candidates[choice.index], num_open
        except Exception as error:  # a plugin's function may raise anything
            self._forget_roster(request.model)  # its ranking may be half up to date
            logger.exception("routing policy %r has failed", policy.name)
            raise Refusal(500, f"Routing policy {policy.name!r} has failed.") from error

    def _ranks(self) -> bool:
        """Whether looking at each of many candidates can be helped."""
        return self.policy.ranking is not None or self.has_room is not None

    def _roster(self, model: str | None, candidates: Sequence[Instance]) -> Roster:
        """These candidates in the order of the policy in force."""
        fleet, policy, has_room = self.fleet, self.policy, self.has_room
        roster = self._rosters.get(model)
        if roster is not None and roster.is_of(candidates, policy, has_room):
            self._rosters.move_to_end(model)
            return roster
        for name, other in tuple(self._rosters.items()):
            if not other.is_of(fleet.candidates(name), policy, has_room):
                self._forget_roster(name)
        if len(self._rosters) >= _MAX_ROSTERS:
            self._forget_roster(next(iter(self._rosters)))
        changed = fleet.watch()
        try:
            roster = Roster(candidates, policy, has_room, changed)
        except BaseException:  # a plugin's ranking may raise anything; raised again
            fleet.unwatch(changed)
            raise
        self._rosters[model] = roster
        return roster

    def _forget_roster(self, model: str | None) -> None:
        """Nobody tells it of changes any more."""
        roster = self._rosters.pop(model, None)
        if roster is not None:
            self.fleet.unwatch(roster.changed)

    def _owner(self, response_id: str) -> Instance | None:
        instance = self.fleet.get(self._owners.get(response_id, ""))
        if instance is None or instance.life.state is State.JOINING:
            return None
        return instance

    def _require_one_model(self) -> None:
        if not self.fleet.common_models():
            known = ", ".join(f"`{name}`" for name in sorted(self.fleet.models()))
            raise Refusal(400, f"Name a `model`; served here are {known}.", param="model")

    def _none_for(self, model: str | None) -> Refusal:
        usable = self.fleet.candidates(None)
        if not usable:
            return self.no_instance("none is ready")
        assert model is not None
        if any(model in instance.models for instance in self.fleet):
            return self.no_instance(f"none with `{model}` is ready")
        return unknown_model(model, self.fleet.models())

    def _decided(
        self,
        request: Exchange,
        instance: Instance,
        policy: str,
        choice: Choice,
        num_candidates: int,
    ) -> Instance:
        cause = choice.cause if num_candidates > 1 or policy == "owner" else "only candidate"
        request.decision = decision = Decision(
            self._clock(),
            request.model,
            instance.name,
            policy,
            choice.reason,
            num_candidates,
            len(request.tried) + 1,
            cause,
        )
        self.decisions.append(decision)
        self.count_cause(policy, cause)
        return instance

    def count_cause(self, policy: str, cause: str, count: int = 1) -> None:
        """Count decisions by policy and cause, of which a bounded number is told apart."""
        counted = (policy, cause)
        if counted not in self.causes and len(self.causes) >= _MAX_CAUSES:
            counted = (policy, "")  # a plugin that gives each choice a cause of its own
        self.causes[counted] = self.causes.get(counted, 0) + count


def _left_of(slo: Slo, request: Exchange) -> Slo:
    """What is left of a promise: the time to the first token runs from the request's arrival."""
    if request.ttft_s >= 0:  # another instance continues its stream
        return slo._replace(ttft_s=_INFINITE)
    return slo._replace(ttft_s=slo.ttft_s - (request.proxy.loop.time() - request.started_s))
