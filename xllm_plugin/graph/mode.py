"""The nouns of graph mode: a batch's shape, a graph's key, and a decision with its reason."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum

__all__ = ["BatchShape", "Decision", "GraphKey", "GraphMode", "Reason"]


class GraphMode(StrEnum):
    """How a step's work is given to the device (paper section 4.2)."""

    EAGER = "eager"
    """Operator by operator."""
    PARTIAL = "partial"
    """The parts whose only dynamic dimension is the number of tokens whole; attention eager."""
    FULL = "full"
    """The whole model."""


class Reason(StrEnum):
    """Why a decision is what it is."""

    READY = "its graph is there"
    UNSUPPORTED = "the device captures no graph for such a batch"
    TOO_LARGE = "it has more tokens than graph.max_tokens"
    TOO_RARE = "such batches are too rare for a graph"
    NOT_CAPTURED = "its graph is not captured yet"
    OVER_BUDGET = "its graph does not fit graph.memory_bytes"
    FAILED = "its graph could not be captured"


@dataclass(frozen=True, slots=True, order=True)
class BatchShape:
    """What of a batch decides over its graph.

    Attributes:
        num_tokens: scheduled in this step, at least 1.
        is_decode: every request has the same number of them, so that a graph may hold attention.
    """

    num_tokens: int
    is_decode: bool

    def __post_init__(self) -> None:
        """Refuse an empty batch."""
        if self.num_tokens < 1:
            raise ValueError(f"a batch of {self.num_tokens} tokens has no shape; 1 is the least")


@dataclass(frozen=True, slots=True, order=True)
class GraphKey:
    """Names a graph to the policy.

    Attributes:
        mode: never eager.
        num_tokens: what its tensors hold.
        is_dynamic: it takes any batch up to `num_tokens` as it is; else the batch is padded.
    """

    mode: GraphMode
    num_tokens: int
    is_dynamic: bool = False

    def padding(self, num_tokens: int) -> int:
        """Tokens computed for nothing when a batch of `num_tokens` runs on it; negative: no fit."""
        spare = self.num_tokens - num_tokens
        return 0 if self.is_dynamic and spare > 0 else spare


@dataclass(frozen=True, slots=True)
class Decision:
    """How one batch runs, and why.

    Attributes:
        key: the graph, or None for eager.
        reason: READY for a graph, otherwise why there is none.
    """

    key: GraphKey | None
    reason: Reason

    @property
    def mode(self) -> GraphMode:
        """The mode it runs in."""
        return GraphMode.EAGER if self.key is None else self.key.mode
