"""The picture of a serving benchmark: latency against throughput, one line a peer."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from xllm_plugin.bench.files import write_atomically

__all__ = ["CurvePoint", "plot_latency_against_throughput"]

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

    Readable at the 900 pixels that GitHub gives a README.  Raises `ImportError` without matplotlib.
    """
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    with plt.rc_context({"font.size": 11, "axes.grid": True, "grid.alpha": 0.3}):
        figure, (tpot, ttft) = plt.subplots(1, 2, figsize=(10, 4.8), layout="constrained")
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
        # Below the panels, where it hides no point.
        handles, labels = tpot.get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside lower center", ncols=len(labels))
        figure.suptitle(title)
        image = io.BytesIO()
        figure.savefig(image, format="png", dpi=110, metadata={"Software": None})
        plt.close(figure)
    write_atomically(path, image.getvalue())
