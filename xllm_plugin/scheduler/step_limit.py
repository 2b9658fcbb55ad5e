"""How long a step may take, by the TTFTs that are asked for.  Imports neither torch nor vLLM."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Final

__all__ = ["max_step_ms"]

STEP_SHARE_OF_TTFT: Final = 0.5
LEAST_SHARE_OF_DEFAULT: Final = 0.25


def max_step_ms(
    default_ttft_ms: float, recent_ttft_ms: Iterable[float], *, runs_ahead: bool
) -> float:
    """The longest step with prompts in it, in ms.

    At most half of the tightest TTFT among the default and what was asked for of late, down to a
    fourth of the default: who comes meanwhile has the rest.  Where steps are scheduled ahead it
    waits for two, which share that part.

    Args:
        default_ttft_ms: of a request that asks for none.
        recent_ttft_ms: of the online requests that came of late.
        runs_ahead: whether a step is scheduled while the one before it runs.
    """
    tightest_ms = min([default_ttft_ms, *recent_ttft_ms])
    tightest_ms = max(LEAST_SHARE_OF_DEFAULT * default_ttft_ms, tightest_ms)
    return STEP_SHARE_OF_TTFT * tightest_ms / (2 if runs_ahead else 1)
