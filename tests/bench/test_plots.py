"""The picture is a PNG of the size that fits a README."""

from __future__ import annotations

import struct
from pathlib import Path

from xllm_plugin.bench.plots import CurvePoint, plot_latency_against_throughput


def test_png(tmp_path: Path) -> None:
    path = tmp_path / "result.png"
    curve = [CurvePoint("1 client", 30, 20, 100), CurvePoint("8 clients", 140, 60, 900)]
    curves = {"stock": curve, "xllm": curve[:1]}
    plot_latency_against_throughput(curves, tpot_bound_ms=50, title="How much?", path=path)
    data = path.read_bytes()
    assert data.startswith(b"\x89PNG")
    width, height = struct.unpack(">II", data[16:24])
    assert (width, height) == (1100, 528)
