"""The pictures of the benchmarks, readable at the 900 pixels that GitHub gives a README."""

from __future__ import annotations

import contextlib
import io
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from xllm_plugin.bench.files import write_atomically

__all__ = [
    "CurvePoint",
    "Labels",
    "RequestBar",
    "plot_burst",
    "plot_curves",
    "plot_latency_against_throughput",
    "plot_over_time",
]

_MARKERS = "osD^vPX*"


@dataclass(frozen=True, slots=True)
class CurvePoint:
    """Medians of one peer at one load."""

    label: str
    output_tok_s: float
    tpot_p90_ms: float
    ttft_p90_ms: float


def plot_latency_against_throughput(
    curves: Mapping[str, Sequence[CurvePoint]], *, tpot_bound_ms: float, title: str, path: Path
) -> None:
    """Write a PNG with two panels, TPOT and TTFT (both p90) over output throughput.

    Raises `ImportError` without matplotlib.
    """
    with _drawing(path, panels=2, height=4.8) as (figure, (tpot, ttft)):
        for marker, (peer, points) in zip(_MARKERS * len(curves), curves.items(), strict=False):
            speed = [point.output_tok_s for point in points]
            style = {"marker": marker, "markersize": 6, "linewidth": 2, "label": peer}
            tpot.plot(speed, [point.tpot_p90_ms for point in points], **style)
            ttft.plot(speed, [point.ttft_p90_ms / 1e3 for point in points], **style)
        bound = f"bound, {tpot_bound_ms:g} ms"
        tpot.axhline(tpot_bound_ms, color="black", linestyle="--", linewidth=1.2, label=bound)
        for axes, label in ((tpot, "TPOT p90, ms"), (ttft, "TTFT p90, s")):
            axes.set(xlabel="output throughput, tokens/s", ylabel=label, ylim=(0, None))
            axes.set_xlim(left=0)
        _legend(figure, [tpot])
        figure.suptitle(title)


@dataclass(frozen=True, slots=True)
class Labels:
    """What the axes of `plot_curves` show, and the bound that is drawn over all panels."""

    x: str
    y: str
    bound: str
    bound_y: float


def plot_curves(
    panels: Mapping[str, Mapping[str, Sequence[tuple[float, float]]]],
    *,
    labels: Labels,
    title: str,
    path: Path,
) -> None:
    """Write a PNG: panels side by side, a line a side.

    Args:
        panels: title of the panel, name of the side, and points (x, y) in the order of the line.
        labels: of both axes and the bound.
        title: over all panels.
        path: of the PNG.

    Raises `ImportError` without matplotlib.
    """
    with _drawing(path, panels=len(panels), height=4.8) as (figure, axes):
        for axis, (panel, curves) in zip(axes, panels.items(), strict=True):
            for marker, (side, points) in zip(_MARKERS * len(curves), curves.items(), strict=False):
                x, y = [x for x, _ in points], [y for _, y in points]
                axis.plot(x, y, marker=marker, markersize=5, linewidth=1.8, label=side)
            bound = {"color": "black", "linestyle": "--", "linewidth": 1.2, "label": labels.bound}
            axis.axhline(labels.bound_y, **bound)
            axis.set(title=panel, xlabel=labels.x, ylim=(0, None))
            axis.set_xlim(left=0)
        axes[0].set_ylabel(labels.y)
        _legend(figure, axes)
        figure.suptitle(title)


def plot_over_time(
    lines: Mapping[str, Sequence[tuple[float, float]]], *, y: str, title: str, path: Path
) -> None:
    """Write a PNG with one panel: a line a name, of points (seconds, y).

    Raises `ImportError` without matplotlib.
    """
    with _drawing(path, panels=1, height=4.0) as (figure, (axis,)):
        for name, points in lines.items():
            axis.plot(*zip(*points, strict=True), linewidth=1.6, label=name)
        axis.set(xlabel="time, s", ylabel=y, ylim=(0, None))
        _legend(figure, [axis])
        figure.suptitle(title)


@dataclass(frozen=True, slots=True)
class RequestBar:
    """One request on a time line, in seconds; what never came is None."""

    due_s: float
    first_s: float | None
    last_s: float | None
    is_kept: bool


def plot_burst(
    panels: Mapping[str, Sequence[RequestBar]],
    *,
    burst_s: tuple[float, float],
    shown_s: tuple[float, float],
    title: str,
    path: Path,
) -> None:
    """Write a PNG with a panel a side: each request a line, waiting and then answering, over time.

    Args:
        panels: name of the side, and its requests.
        burst_s: begin and end of the burst, shaded.
        shown_s: begin and end of the time axis.
        title: over all panels.
        path: of the PNG.

    Raises `ImportError` without matplotlib.
    """
    with _drawing(path, panels=len(panels), height=5.2) as (figure, axes):
        for axis, (side, bars) in zip(axes, panels.items(), strict=True):
            axis.axvspan(*burst_s, color="gold", alpha=0.25, label="burst")
            seen: set[str] = set()
            for row, bar in enumerate(sorted(bars, key=lambda bar: bar.due_s)):
                for label, colour, begin_s, end_s in _segments(bar, shown_s[1]):
                    name = {} if label in seen else {"label": label}
                    axis.plot([begin_s, end_s], [row, row], color=colour, linewidth=2, **name)
                    seen.add(label)
            kept = sum(bar.is_kept for bar in bars)
            axis.set(title=f"{side}: {kept} of {len(bars)} kept", xlabel="time, s", xlim=shown_s)
        axes[0].set_ylabel("requests, by arrival")
        _legend(figure, axes)
        figure.suptitle(title)


def _legend(figure: Any, axes: Any) -> None:
    """One for all panels, below them, where it hides nothing."""
    found = [axis.get_legend_handles_labels() for axis in axes]
    named = {name: line for both in found for line, name in zip(*both, strict=True)}
    columns = min(len(named), 5)
    figure.legend(named.values(), named.keys(), loc="outside lower center", ncols=columns)


def _segments(bar: RequestBar, end_s: float) -> Iterator[tuple[str, str, float, float]]:
    """Label, colour, begin and end of what one request did."""
    yield "waiting for the first token", "silver", bar.due_s, min(bar.first_s or end_s, end_s)
    if bar.first_s is not None and bar.last_s is not None:
        label, colour = ("kept", "tab:blue") if bar.is_kept else ("broken", "tab:red")
        # A single token is a moment: give it some width.
        yield label, colour, bar.first_s, max(bar.last_s, bar.first_s + 0.03)


@contextlib.contextmanager
def _drawing(path: Path, *, panels: int, height: float) -> Iterator[tuple[Any, Any]]:
    """A figure 10 inches wide and its axes, written to `path` when the block ends well."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    with plt.rc_context({"font.size": 11, "axes.grid": True, "grid.alpha": 0.3}):
        figure, axes = plt.subplots(
            1, panels, figsize=(10, height), layout="constrained", squeeze=False
        )
        try:
            yield figure, axes[0]
            image = io.BytesIO()
            figure.savefig(image, format="png", dpi=110, metadata={"Software": None})
        finally:
            plt.close(figure)
    write_atomically(path, image.getvalue())
