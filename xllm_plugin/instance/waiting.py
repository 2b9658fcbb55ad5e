"""Who waits for a first token in this API server: by class, by tenant, by deadline.

vLLM counts the same requests (`EngineClient.get_num_queued_tokens`), but not by whose they are.
The engine's snapshot has all API servers' requests, but it is as old as the step that runs.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from xllm_plugin.scheduler.promise import Promise, ServiceClass

__all__ = ["OTHER_TENANTS", "QueueView", "WaitingList", "WaitingRequest"]

OTHER_TENANTS = "*"
# A tenant that asked this recently keeps its share, so that others do not fill the queue between
# two of its requests.
_MEMORY_S = 30.0
# A handler hands a request over as soon as its answer begins.  What vLLM does not know after so
# long has come and gone between two sweeps, as the many short ones of a beam search do.
_HAND_OVER_S = 1.0

IsPrefilling = Callable[[str], bool | None]


@dataclass(frozen=True, slots=True, eq=False)
class WaitingRequest:
    """One request before its first token; two of the same id are two.

    Attributes:
        request_id: as vLLM was given it.
        service_class: online or offline.
        account: the tenant it counts for.
        num_tokens: of its prompt.
        added_s: when it came, on the list's clock.
        deadline_s: when its first token is due.
    """

    request_id: str
    service_class: ServiceClass
    account: str
    num_tokens: int
    added_s: float
    deadline_s: float


@dataclass(frozen=True, slots=True)
class QueueView:
    """What a request of one class and tenant finds when it comes.

    Attributes:
        num_requests: of its class that wait.
        num_tokens: of their prompts.
        tenant_requests: those of them that are its tenant's.
        tenant_tokens: of their prompts.
        tenant_share: of the class's room that is its tenant's, over 0, at most 1.
        ahead_tokens: of prompts that are served before it.
    """

    num_requests: int = 0
    num_tokens: int = 0
    tenant_requests: int = 0
    tenant_tokens: int = 0
    tenant_share: float = 1.0
    ahead_tokens: int = 0


class WaitingList:
    """The requests that were admitted and have no token yet.

    Args:
        tenant_weights: tenant -> weight; empty for no shares.
        by_deadline: whether the engine serves online requests by their deadlines, before all
            offline ones; else in order of arrival.
    """

    def __init__(self, tenant_weights: Mapping[str, float], *, by_deadline: bool) -> None:
        self._weights = {OTHER_TENANTS: 1.0, **tenant_weights}
        self._has_shares = bool(tenant_weights)
        self._by_deadline = by_deadline
        self._requests: dict[WaitingRequest, bool] = {}  # -> whether vLLM has been seen to have it
        self._num_requests: Counter[tuple[ServiceClass, str]] = Counter()
        self._num_tokens: Counter[tuple[ServiceClass, str]] = Counter()
        self._asked_s: dict[tuple[ServiceClass, str], float] = {}

    def __len__(self) -> int:
        return len(self._requests)

    def look(self, promise: Promise, now_s: float) -> QueueView:
        """What a request of this promise finds; its tenant counts as present from now on."""
        kind, account = promise.service_class, self._account(promise.tenant)
        self._asked_s[kind, account] = now_s
        return QueueView(
            num_requests=_of_class(self._num_requests, kind),
            num_tokens=_of_class(self._num_tokens, kind),
            tenant_requests=self._num_requests[kind, account],
            tenant_tokens=self._num_tokens[kind, account],
            tenant_share=self._share(kind, account, now_s),
            ahead_tokens=self._ahead_tokens(kind, now_s + promise.ttft_ms / 1000),
        )

    def add(
        self, request_id: str, promise: Promise, num_tokens: int, now_s: float
    ) -> WaitingRequest:
        """Let a request wait; what it returns is for `discard`."""
        account = self._account(promise.tenant)
        deadline_s = now_s + promise.ttft_ms / 1000
        request = WaitingRequest(
            request_id, promise.service_class, account, num_tokens, now_s, deadline_s
        )
        self._requests[request] = False
        self._num_requests[request.service_class, account] += 1
        self._num_tokens[request.service_class, account] += num_tokens
        return request

    def discard(self, request: WaitingRequest) -> None:
        """A request has its token, or is gone.  Safe to repeat."""
        if self._requests.pop(request, None) is None:
            return
        self._num_requests[request.service_class, request.account] -= 1
        self._num_tokens[request.service_class, request.account] -= request.num_tokens

    def sweep(self, is_prefilling: IsPrefilling, now_s: float) -> None:
        """Discard those that no longer wait.

        Args:
            is_prefilling: of a request id: whether it waits for its first token; None if it is not
                known, because it has ended or its handler has not yet handed it over.
            now_s: on the list's clock.
        """
        for request, was_known in list(self._requests.items()):
            waits = is_prefilling(request.request_id)
            if waits:
                self._requests[request] = True
            elif waits is False or was_known or now_s > request.added_s + _HAND_OVER_S:
                self.discard(request)

    def check_integrity(self) -> None:
        """Assert that the sums are those of the requests."""
        for kind, account in self._num_requests:
            mine = [r for r in self._requests if (r.service_class, r.account) == (kind, account)]
            assert self._num_requests[kind, account] == len(mine)
            assert self._num_tokens[kind, account] == sum(r.num_tokens for r in mine)

    def _account(self, tenant: str) -> str:
        return tenant if tenant in self._weights else OTHER_TENANTS

    def _share(self, kind: ServiceClass, account: str, now_s: float) -> float:
        if not self._has_shares:
            return 1.0
        present = (
            name
            for name in self._weights
            if self._num_requests[kind, name]
            or now_s - self._asked_s.get((kind, name), -_MEMORY_S) < _MEMORY_S
        )
        return self._weights[account] / sum(self._weights[name] for name in present)

    def _ahead_tokens(self, kind: ServiceClass, deadline_s: float) -> int:
        if not self._by_deadline:
            return sum(self._num_tokens.values())
        if kind is ServiceClass.OFFLINE:
            return sum(self._num_tokens.values())
        return sum(
            request.num_tokens
            for request in self._requests
            if request.service_class is ServiceClass.ONLINE and request.deadline_s <= deadline_s
        )


def _of_class(counts: Counter[tuple[ServiceClass, str]], kind: ServiceClass) -> int:
    return sum(count for (other, _), count in counts.items() if other is kind)
