"""Requests with promises of their own: who is promised what, and how many of each kind keep it."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass, replace

from xllm_plugin.bench.fleet_simulator.summary import Promise, Served, quantile
from xllm_plugin.bench.fleet_simulator.workload import Arrival
from xllm_plugin.service.policy import Slo

__all__ = ["Share", "ShareSummary", "by_share", "with_promises"]


@dataclass(frozen=True, slots=True)
class Share:
    """A kind of request, and what those of it say that they were promised."""

    name: str
    slo: Slo


@dataclass(frozen=True, slots=True)
class ShareSummary:
    """Of the requests of one kind; times in seconds."""

    num_requests: int
    num_kept: int
    """All of the offline ones: they have no promise to break."""
    ttft_p90_s: float
    tpot_p90_s: float
    mean_s: float
    """From arrival to the last token."""


def with_promises(traffic: Sequence[Arrival], shares: Sequence[Share], seed: int) -> list[Arrival]:
    """The same requests, each with the promise of a share that is drawn for it, all as likely."""
    rng = random.Random(f"promises:{seed}")  # noqa: S311 - traffic, not secrets
    return [replace(one, slo=rng.choice(shares).slo) for one in traffic]


def by_share(
    served: Sequence[Served], traffic: Sequence[Arrival], shares: Sequence[Share]
) -> dict[str, ShareSummary]:
    """What became of each share's requests.

    Args:
        served: all requests of a run.
        traffic: as `with_promises` made it, whatever of it the run was told.
        shares: at least one request of each.
    """
    found = {}
    for share in shares:
        ours = [one for one in served if traffic[one.number].slo == share.slo]
        promise = Promise(share.slo.ttft_s, share.slo.tpot_s)
        found[share.name] = ShareSummary(
            num_requests=len(ours),
            num_kept=sum(one.keeps(promise) for one in ours),
            ttft_p90_s=quantile([one.ttft_s for one in ours], 0.9),
            tpot_p90_s=quantile([one.tpot_s for one in ours], 0.9),
            mean_s=sum(one.done_s - one.at_s for one in ours) / len(ours),
        )
    return found
