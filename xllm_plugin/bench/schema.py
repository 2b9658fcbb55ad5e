"""The one form in which every benchmark writes what it found.

A result is complete in itself: the question, how it was asked (command, peers, machine, commit),
what came out (rows of figures), what was checked before a figure counted, and what it does not
show.  Tables in READMEs are rendered from this file (`xllm_plugin.bench.readme`), never typed.

::

    run = schema.begin("serving", question="...", command=("xllm", "bench", "serving"))
    result = run.finish(peers=[...], rows=[
        Row(table="At the bound", labels={"peer": "stock"},
            figures=(Figure.of("throughput", "tok/s", [141.2, 143.0, 144.9]),)),
    ])
    schema.dump(result, path)
"""

from __future__ import annotations

import json
import statistics
from collections.abc import Iterable, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Final, Literal, Self

import pydantic
from pydantic import BaseModel, ConfigDict, Field, model_validator

from xllm_plugin.bench import provenance
from xllm_plugin.bench.files import write_atomically
from xllm_plugin.errors import ConfigError

__all__ = ["Check", "Figure", "Machine", "Peer", "Result", "Row", "Run", "begin", "dump", "load"]

SCHEMA_VERSION: Final = 1


class _Record(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class Machine(_Record):
    """Where it ran, as far as it bears on the figures; no host or user name."""

    cpu: str
    cores: int = Field(gt=0, description="logical processors this process may run on")
    memory_gib: float = Field(gt=0)
    accelerator: str = Field(default="none", description="model of the device used")
    kernel: str
    python: str
    torch: str = Field(description="version, or 'not installed'")
    vllm: str = Field(description="version, or 'not installed'")


class Peer(_Record):
    """One of the things compared."""

    name: str
    what: str = Field(description="one phrase a reader understands without the command line")
    command: tuple[str, ...] = Field(default=(), description="exact; paths made relative or ~")
    environment: dict[str, str] = Field(default_factory=dict, description="additions only")


class Figure(_Record):
    """One measured quantity over `n` repeats."""

    name: str
    unit: str = Field(description="'' for a count or a ratio")
    median: float
    minimum: float
    maximum: float
    n: int = Field(gt=0)

    @model_validator(mode="after")
    def _is_ordered(self) -> Self:
        if not self.minimum <= self.median <= self.maximum:
            raise ValueError(
                f"{self.name}: minimum {self.minimum}, median {self.median} and maximum "
                f"{self.maximum} are not in order"
            )
        return self

    @classmethod
    def of(cls, name: str, unit: str, values: Sequence[float]) -> Figure:
        """Summarise repeats.  Raises `ValueError` when there are none."""
        if not values:
            raise ValueError(f"figure {name!r} has no values")
        return cls(
            name=name,
            unit=unit,
            median=statistics.median(values),
            minimum=min(values),
            maximum=max(values),
            n=len(values),
        )

    @classmethod
    def ratio(
        cls, name: str, values: Sequence[float], bases: Sequence[float], unit: str = ""
    ) -> Figure:
        """Summarise `values` over `bases`, each within its repeat."""
        ratios = [value / base for value, base in zip(values, bases, strict=True)]
        return cls.of(name, unit, ratios)


class Row(_Record):
    """One line of one table: what it is about, and its figures."""

    table: str = Field(default="", description="rows with the same title form one table")
    labels: dict[str, str] = Field(description="leading columns, e.g. {'peer': 'stock'}")
    figures: tuple[Figure, ...]

    def figure(self, name: str) -> Figure | None:
        """The figure of that name, or None."""
        return next((figure for figure in self.figures if figure.name == name), None)


class Check(_Record):
    """Something verified before the figures count."""

    name: str
    passed: bool
    detail: str = ""


class Result(_Record):
    """A finished benchmark run."""

    schema_version: Literal[1] = SCHEMA_VERSION
    name: str = Field(pattern=r"^[a-z0-9][a-z0-9_-]*$", description="folder under benchmarks/")
    question: str
    command: str = Field(description="the command line that repeats it")
    started: datetime = Field(description="UTC")
    duration_s: float = Field(ge=0)
    commit: str = Field(description="git commit of the source, or 'unknown'")
    dirty: bool = Field(description="whether the working tree differed from that commit")
    machine: Machine
    peers: tuple[Peer, ...] = ()
    rows: tuple[Row, ...] = ()
    checks: tuple[Check, ...] = ()
    notes: tuple[str, ...] = Field(default=(), description="how to read the figures")
    not_shown: tuple[str, ...] = Field(default=(), description="what it does not show")
    details: dict[str, Any] = Field(
        default_factory=dict,
        description="the benchmark's own JSON, e.g. every repeat; not rendered",
    )

    @property
    def passed(self) -> bool:
        """Whether every check passed: figures of a failed run do not count."""
        return all(check.passed for check in self.checks)


class Run(_Record):
    """A benchmark under way: what is known at its start."""

    name: str
    question: str
    command: str
    started: datetime
    commit: str
    dirty: bool
    machine: Machine

    def finish(
        self,
        *,
        peers: Iterable[Peer] = (),
        rows: Iterable[Row] = (),
        checks: Iterable[Check] = (),
        notes: Iterable[str] = (),
        not_shown: Iterable[str] = (),
        details: dict[str, Any] | None = None,
    ) -> Result:
        """Add what came out."""
        return Result(
            **dict(self),
            duration_s=round((datetime.now(UTC) - self.started).total_seconds(), 1),
            peers=tuple(peers),
            rows=tuple(rows),
            checks=tuple(checks),
            notes=tuple(notes),
            not_shown=tuple(not_shown),
            details=details or {},
        )


def begin(name: str, *, question: str, command: str, accelerator: str = "none") -> Run:
    """Record the machine, commit and time before the first measurement."""
    commit, dirty = provenance.git_commit()
    return Run(
        name=name,
        question=question,
        command=command,
        started=datetime.now(UTC).replace(microsecond=0),
        commit=commit,
        dirty=dirty,
        machine=Machine(accelerator=accelerator, **provenance.describe_machine()),
    )


def dump(result: Result, path: Path) -> None:
    """Write `result` as JSON, all of it or nothing."""
    write_atomically(path, json.dumps(result.model_dump(mode="json"), indent=1) + "\n")


def load(path: Path) -> Result:
    """Read a result.  Raises `ConfigError` when the file is absent or not of this schema."""
    try:
        return Result.model_validate_json(path.read_bytes())
    except FileNotFoundError as error:
        raise ConfigError(f"no benchmark result at {path}; run `xllm bench NAME`") from error
    except pydantic.ValidationError as error:
        raise ConfigError(
            f"{path} is not a benchmark result of schema {SCHEMA_VERSION}: {error}; "
            "run the benchmark again to rewrite it"
        ) from error
