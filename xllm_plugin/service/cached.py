"""How much of a prompt each candidate holds, where most of them hold the same."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

__all__ = ["CachedTokens", "most_cached", "usual_and_others"]


class CachedTokens(Mapping[str, float]):
    """Candidate's name -> tokens that it need not compute.

    A system prompt that everybody sends is held by nearly everybody: a thousand equal entries would
    cost more to make than the choice.  So what most hold is said once.

    Args:
        usual: tokens that all hold who are not among `others`; over 0.
        others: tokens of these, 0 for those that hold nothing.
        names: of the candidates.
    """

    __slots__ = ("_names", "others", "usual")

    def __init__(self, usual: float, others: Mapping[str, float], names: Sequence[str]) -> None:
        self.usual = usual
        self.others = others
        self._names = names

    def __getitem__(self, name: str) -> float:
        return self.others.get(name, self.usual)

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)


def usual_and_others(cached: Mapping[str, float]) -> tuple[float, Mapping[str, float]]:
    """Tokens that most candidates hold, and those of the candidates that hold another number."""
    if isinstance(cached, CachedTokens):
        return cached.usual, cached.others
    return 0.0, cached


def most_cached(cached: Mapping[str, float]) -> float:
    """Tokens that the best candidate holds; 0 if none holds any."""
    usual, others = usual_and_others(cached)
    return max(usual, max(others.values(), default=0.0))
