"""A contract is a list of clauses; a clause is a function that raises `AssertionError`."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

__all__ = ["Contract", "Unchecked", "UncheckedError", "refuses", "require"]

SubjectT = TypeVar("SubjectT")


class UncheckedError(Exception):
    """A clause lacks the means to be checked here; the message says which."""


@dataclass(frozen=True, slots=True)
class Unchecked:
    """A clause that could not be checked, and why."""

    clause: str
    reason: str


class Contract(Generic[SubjectT]):
    """Clauses in the order in which they build on each other.

    A clause's name is its function's; its sentence is the first line of the docstring.
    """

    def __init__(self, name: str) -> None:
        self.name = name
        self._clauses: dict[str, Callable[[SubjectT], None]] = {}

    @property
    def clauses(self) -> tuple[str, ...]:
        """The clauses' names."""
        return tuple(self._clauses)

    def clause(self, function: Callable[[SubjectT], None]) -> Callable[[SubjectT], None]:
        """Add a clause; a decorator."""
        self._clauses[function.__name__] = function
        return function

    def sentence(self, clause: str) -> str:
        """The clause in words."""
        return (inspect.getdoc(self._clauses[clause]) or clause).splitlines()[0]

    def check_clause(self, clause: str, subject: SubjectT) -> None:
        """Check one clause.

        Raises:
            AssertionError: it is broken.
            UncheckedError: `subject` brings no means to check it.
        """
        try:
            self._clauses[clause](subject)
        except UncheckedError:
            raise
        except AssertionError as error:
            raise AssertionError(self._broken(clause, str(error))) from error
        except Exception as error:
            # A foreign implementation may raise anything, and each is a breach of the clause.
            seen = f"{type(error).__name__} was raised: {error}"
            raise AssertionError(self._broken(clause, seen)) from error

    def check(self, subject: SubjectT) -> tuple[Unchecked, ...]:
        """Check every clause in order.

        Returns:
            The clauses that `subject` brings no means to check.

        Raises:
            AssertionError: the first broken clause.
        """
        unchecked = []
        for clause in self._clauses:
            try:
                self.check_clause(clause, subject)
            except UncheckedError as error:
                unchecked.append(Unchecked(clause, str(error)))
        return tuple(unchecked)

    def _broken(self, clause: str, seen: str) -> str:
        return f"{self.name}, {clause}: {self.sentence(clause)}\nBut {seen}"


def require(condition: bool, otherwise: str) -> None:
    """Raise `AssertionError` unless `condition`, also under ``python -O``."""
    if not condition:
        raise AssertionError(otherwise)


def refuses(error: type[Exception], what: str, call: Callable[..., Any], *args: Any) -> None:
    """Require that `call` on `args`, described by `what`, raises `error` and nothing else."""
    try:
        result = call(*args)
    except error:
        return
    except Exception as other:
        raise AssertionError(
            f"{what} raised {type(other).__name__} ({other}) instead of {error.__name__}."
        ) from other
    raise AssertionError(f"{what} returned {result!r} instead of raising {error.__name__}.")
