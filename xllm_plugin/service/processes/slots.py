"""Which line of a shared table is whose, and when it can be another's."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator

from xllm_plugin.errors import MisuseError

__all__ = ["Ledger", "Slots"]


class Ledger:
    """Numbers what workers are told, and knows what all of them have taken in."""

    def __init__(self) -> None:
        self.number = 0
        """Of the last news."""
        self._taken: dict[int, int] = {}
        """Worker that was sent any -> the last news that it has taken in."""

    def sent(self, worker: int) -> int:
        """News go to a worker; returns their number."""
        self.number += 1
        self._taken.setdefault(worker, 0)
        return self.number

    def taken(self, worker: int, number: int) -> None:
        """A worker has taken in all news up to this number."""
        if worker in self._taken:
            self._taken[worker] = max(number, self._taken[worker])

    def gone(self, worker: int) -> None:
        """A worker takes nothing in any more; its successor is told everything anew."""
        self._taken.pop(worker, None)

    def is_taken(self, number: int) -> bool:
        """Whether every worker has taken in what came up to `number`."""
        return number <= self.number and all(taken >= number for taken in self._taken.values())


class Slots:
    """Gives names a slot each, and takes back those that nobody uses any more.

    A slot is used again when its name is forgotten, every worker has been told so, and nothing is
    counted in it: a request that outlives its instance still has to be taken out of the right line.

    Args:
        num_slots: how many there are.
        is_idle: whether nothing is counted in a slot.
        what: is counted, for messages.
        ledger: knows what workers were told.
    """

    def __init__(
        self, num_slots: int, is_idle: Callable[[int], bool], what: str, ledger: Ledger
    ) -> None:
        self.num_used = 0
        """Slots that were ever given: the first ones."""
        self._num_slots = num_slots
        self._is_idle = is_idle
        self._what = what
        self._ledger = ledger
        self._slots: dict[str, int] = {}
        self._forgotten: dict[str, int] = {}
        """Name -> number of the news that tell workers of it."""

    def slot(self, name: str) -> int:
        """The slot of `name`.

        Raises:
            MisuseError: all are in use.
        """
        self._forgotten.pop(name, None)
        slot = self._slots.get(name)
        if slot is None:
            slot = self._slots[name] = self._free()
        return slot

    def require_room(self, names: Iterable[str]) -> None:
        """Raise `MisuseError`, as `slot` would, unless each of `names` can have one."""
        wanted = set(names)
        num_free = self._num_slots - self.num_used
        num_free += sum(name not in wanted for name in self._reusable())
        if len(wanted - self._slots.keys()) > num_free:
            raise self._too_many()

    def forget(self, name: str) -> None:
        """Nobody counts for `name` any more who has taken in the next news."""
        if name in self._slots:
            self._forgotten[name] = self._ledger.number + 1

    def _free(self) -> int:
        if self.num_used < self._num_slots:
            self.num_used += 1
            return self.num_used - 1
        name = next(self._reusable(), None)
        if name is None:
            raise self._too_many()
        del self._forgotten[name]
        return self._slots.pop(name)

    def _reusable(self) -> Iterator[str]:
        for name, number in self._forgotten.items():
            if self._ledger.is_taken(number) and self._is_idle(self._slots[name]):
                yield name

    def _too_many(self) -> MisuseError:
        return MisuseError(
            f"{self._num_slots} {self._what} are known, the most that several processes share; "
            "remove some, or set service.processes=1."
        )
