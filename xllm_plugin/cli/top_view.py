"""What `xllm top` shows: one frame from what the engines say, as rich's tables.

A table of all engines from what every engine publishes; under it, of those whose scheduler reports
it, requests by class and state with the time they have left, and the last step as it was predicted
and as it was.
"""

from __future__ import annotations

from dataclasses import dataclass

from rich import box
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from xllm_plugin.channel.messages import Reading, Readings, Snapshot
from xllm_plugin.errors import ChannelError
from xllm_plugin.scheduler.report import REPORT_SECTION, SchedulerReport
from xllm_plugin.xtensor.messages import MEMORY_SECTION, MemoryReport, MemorySection
from xllm_plugin.xtensor.page import PageState

__all__ = ["Rates", "frame", "memory_text"]

# A busy engine publishes every 100 ms; this long without one is worth a look.
_STALE_S = 5.0


@dataclass(frozen=True, slots=True)
class _Mark:
    snapshot: Snapshot
    looked_s: float
    tokens_per_s: float | None


class Rates:
    """Tokens per second of each engine, from its successive snapshots."""

    def __init__(self) -> None:
        self._marks: dict[tuple[str, int, int], _Mark] = {}

    def update(self, readings: Readings) -> None:
        """Take the next look into account."""
        self._marks = {
            _key(reading.snapshot): self._advanced(reading.snapshot, reading.age_s or 0.0)
            for reading in readings.engines
            if reading.snapshot
        }

    def of(self, snapshot: Snapshot) -> float | None:
        """Tokens per second; None before two snapshots of the engine have been seen."""
        mark = self._marks.get(_key(snapshot))
        return None if mark is None else mark.tokens_per_s

    def _advanced(self, snapshot: Snapshot, age_s: float) -> _Mark:
        looked_s = snapshot.monotonic_s + age_s
        previous = self._marks.get(_key(snapshot))
        if previous is None:
            return _Mark(snapshot, looked_s, None)
        if snapshot.sequence == previous.snapshot.sequence:
            # Nothing new: an idle engine stays silent, a busy one is in a long step.
            rate = 0.0 if snapshot.load.is_idle else previous.tokens_per_s
            return _Mark(snapshot, looked_s, rate)
        before = previous.snapshot
        num_tokens = snapshot.load.num_generated_tokens - before.load.num_generated_tokens
        # Idle time before the last look is not part of what has happened since.
        since_s = previous.looked_s if before.load.is_idle else before.monotonic_s
        elapsed_s = snapshot.monotonic_s - since_s
        rate_now = num_tokens / elapsed_s if elapsed_s > 0 else previous.tokens_per_s
        return _Mark(snapshot, looked_s, rate_now)


def _key(snapshot: Snapshot) -> tuple[str, int, int]:
    # The pid tells a restarted engine, whose totals begin again, from the one before.
    return snapshot.engine.instance_id, snapshot.engine.dp_rank, snapshot.engine.pid


_MAX_NAME = 12
_TEXT_COLUMNS = ("engine", "model", "device")
_NUMBER_COLUMNS = (
    *("running", "waiting", "KV %", "tok/s"),
    *("step ms", "steps", "preempted", "age s"),
)


def frame(readings: Readings, rates: Rates, hint: str = "") -> RenderableType:
    """One look: all engines; then requests and steps of those whose scheduler reports them."""
    reports, problems = _reports(readings)
    tables = [_engines(readings, rates)]
    if reports:
        tables += [_requests(reports), _steps(reports)]
    return Group(*tables, _remarks(readings, problems, hint))


def _reports(readings: Readings) -> tuple[list[tuple[Snapshot, SchedulerReport]], list[str]]:
    """The schedulers' reports, and why one cannot be read."""
    found, problems = [], []
    for reading in readings.engines:
        if reading.snapshot is None:
            continue
        try:
            report = reading.snapshot.section(REPORT_SECTION, SchedulerReport)
        except ChannelError as error:
            problems.append(f"{_name(reading.snapshot)}: {error}")
            continue
        if report is not None:
            found.append((reading.snapshot, report))
    return found, problems


def _engines(readings: Readings, rates: Rates) -> Table:
    table = _table("xllm engines", _TEXT_COLUMNS, _NUMBER_COLUMNS)
    for reading in readings.engines:
        table.add_row(*_row(reading, rates))
    return table


def _requests(reports: list[tuple[Snapshot, SchedulerReport]]) -> Table:
    table = _table(
        "requests", ("engine", "class"), ("running", "held", "waiting", "late", "slack ms")
    )
    for snapshot, report in reports:
        for kind, requests in (("online", report.online), ("offline", report.offline)):
            table.add_row(
                _text(_name(snapshot)),
                _text(kind),
                _text(requests.num_running),
                _text(requests.num_held),
                _text(requests.num_waiting),
                _text(requests.num_late, "red" if requests.num_late else ""),
                _slack(requests.least_slack_ms),
            )
    return table


def _slack(slack_ms: float | None) -> Text:
    if slack_ms is None:
        return _text("-")
    return _text(f"{slack_ms:.0f}", "red" if slack_ms < 0 else "")


def _steps(reports: list[tuple[Snapshot, SchedulerReport]]) -> Table:
    table = _table(
        "last step",
        ("engine", "policy"),
        (
            *("requests", "decode tok", "prompt tok", "context tok"),
            *("predicted ms", "measured ms", "error %", "bound"),
        ),
    )
    for snapshot, report in reports:
        step = report.step
        table.add_row(
            _text(_name(snapshot)),
            _text(report.policy),
            _text(step.num_sequences),
            _text(step.decode_tokens),
            _text(step.prefill_tokens),
            _text(step.context_tokens),
            _number(step.predicted_ms),
            _number(step.measured_ms),
            _number(
                None if report.error is None else 100 * report.error,
                "yellow" if report.is_cautious else "",
            ),
            _text(step.bound or "-"),
        )
    return table


def _number(value: float | None, style: str = "") -> Text:
    return _text("-" if value is None else f"{value:.1f}", style)


def _text(value: object, style: str = "") -> Text:
    return Text(str(value), style=style)  # not markup: names are the users'


def _table(title: str, texts: tuple[str, ...], numbers: tuple[str, ...]) -> Table:
    table = Table(
        title=title,
        title_justify="left",
        box=box.SIMPLE_HEAD,  # eleven columns fit a terminal of 80
        padding=(0, 1, 0, 0),
    )
    for heading in texts:
        table.add_column(heading, overflow="fold")
    for heading in numbers:
        table.add_column(heading, justify="right")
    return table


def _name(snapshot: Snapshot) -> str:
    return f"{_short(snapshot.engine.instance_id)} dp{snapshot.engine.dp_rank}"


def _short(instance_id: str) -> str:
    """Return the end of vLLM's own ids, which count nanoseconds; names that users gave stay."""
    return instance_id if len(instance_id) <= _MAX_NAME else f"~{instance_id[-6:]}"


def _remarks(readings: Readings, problems: list[str], hint: str) -> Text:
    lines = [
        f"dp{reading.dp_rank}: {reading.error}" for reading in readings.engines if reading.error
    ]
    lines += [line for reading in readings.engines if (line := _memory_line(reading))]
    if not readings.engines:
        lines.append("No engine is running; waiting for one.")
    return Text("\n".join([*lines, *problems, *([hint] if hint else [])]))


def _memory_line(reading: Reading) -> str | None:
    """What an elastic KV cache has taken of its budget, and its pages; None for a fixed one."""
    snapshot = reading.snapshot
    memory = None if snapshot is None else snapshot.section(MEMORY_SECTION, MemorySection)
    if memory is None:
        return None
    lines = [memory_text(memory), *([_pages_text(memory.pages)] if memory.pages else [])]
    return "\n".join(f"dp{reading.dp_rank}: {line}" for line in lines)


def _pages_text(pages: MemoryReport) -> str:
    """Pages by state, and what a call takes that maps or unmaps some."""
    counted = {state.value: getattr(pages, f"num_{state.value}") for state in PageState}
    found = [", ".join(f"{num} {state}" for state, num in counted.items() if num) or "none"]
    if pages.num_map_calls:
        found.append(f"{1e3 * pages.map_s / pages.num_map_calls:.2f} ms to map a batch")
    if pages.num_unmap_calls:
        found.append(f"{1e3 * pages.unmap_s / pages.num_unmap_calls:.2f} ms to unmap one")
    return f"pages: {'; '.join(found)}"


def memory_text(memory: MemorySection) -> str:
    """What an elastic KV cache has taken, and what is left in its pool, if it shares one."""
    line = (
        f"KV memory {memory.resident_bytes / 2**20:.0f} of "
        f"{memory.budget_bytes / 2**20:.0f} MiB, {100 * memory.fragmentation:.0f} % of it unused"
    )
    pool = memory.pool
    if pool is None:
        return line
    return (
        f"{line}; pool {pool.name}: {pool.free_bytes / 2**20:.0f} of "
        f"{pool.total_bytes / 2**20:.0f} MiB free, {len(pool.members)} members"
    )


def _row(reading: Reading, rates: Rates) -> list[Text]:
    snapshot = reading.snapshot
    if snapshot is None:
        return [Text(f"dp{reading.dp_rank}"), Text("no answer", style="red")]
    engine, load, age_s = snapshot.engine, snapshot.load, reading.age_s or 0.0
    rate = rates.of(snapshot)
    is_stale = age_s > _STALE_S and not load.is_idle
    cells = (
        _name(snapshot),
        engine.model,
        engine.device,
        str(load.num_running),
        str(load.num_waiting),
        f"{100 * load.kv_usage:.1f}",
        "-" if rate is None else f"{rate:.1f}",
        f"{load.smoothed_step_ms:.1f}",
        str(load.num_steps),
        str(load.num_preemptions),
    )
    age = Text(f"{age_s:.1f}", style="red" if is_stale else "")
    return [*(Text(cell) for cell in cells), age]
