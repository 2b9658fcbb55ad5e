"""The picture is a PNG of the size that fits a README."""

from __future__ import annotations

import struct
from pathlib import Path

from xllm_plugin.bench.plots import (
    CurvePoint,
    Labels,
    RequestBar,
    plot_burst,
    plot_curves,
    plot_latency_against_throughput,
    plot_over_time,
)


def test_png(tmp_path: Path) -> None:
    path = tmp_path / "result.png"
    curve = [CurvePoint("1 client", 30, 20, 100), CurvePoint("8 clients", 140, 60, 900)]
    curves = {"stock": curve, "xllm": curve[:1]}
    plot_latency_against_throughput(curves, tpot_bound_ms=50, title="How much?", path=path)
    data = path.read_bytes()
    assert data.startswith(b"\x89PNG")
    width, height = struct.unpack(">II", data[16:24])
    assert (width, height) == (1100, 528)


def test_curves_and_burst(tmp_path: Path) -> None:
    curves, burst = tmp_path / "curves.png", tmp_path / "burst.png"
    points = [(1.0, 100.0), (2.0, 40.0)]
    labels = Labels(x="requests/s", y="kept, %", bound="goal", bound_y=90)
    panels = {"1000/50 ms": {"fcfs": points, "slo": points[:1]}, "500/35 ms": {"slo": points}}
    plot_curves(panels, labels=labels, title="Kept", path=curves)
    bars = [
        RequestBar(1.0, 1.5, 2.0, is_kept=True),
        RequestBar(1.2, 1.6, 1.6, is_kept=False),
        RequestBar(1.3, None, None, is_kept=False),
    ]
    sides = {"fcfs": bars, "slo": bars[:1]}
    plot_burst(sides, burst_s=(1.0, 2.0), shown_s=(0.5, 4.0), title="Burst", path=burst)
    for path, height in ((curves, 528), (burst, 572)):
        assert struct.unpack(">II", path.read_bytes()[16:24]) == (1100, height)


def test_lines_over_time(tmp_path: Path) -> None:
    path = tmp_path / "time.png"
    lines = {"live": [(0.0, 1.0), (0.5, 7.0)], "resident": [(0.0, 2.0), (0.5, 8.0)]}
    plot_over_time(lines, y="MiB", title="Memory", path=path)
    assert struct.unpack(">II", path.read_bytes()[16:24]) == (1100, 440)
