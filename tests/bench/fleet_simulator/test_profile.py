"""Step times follow from measured points, and the committed coefficients from theirs."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from xllm_plugin.bench.fleet_simulator.profile import (
    COEFFICIENTS,
    Point,
    fit,
    load_profile,
    pairs_of,
    refit,
)
from xllm_plugin.errors import ConfigError

FOLDER = Path(__file__).parents[3] / "benchmarks" / "fleet" / "profiles"
FILES = sorted(FOLDER.glob("*.json"))


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_committed_coefficients_follow_from_the_points(path: Path, tmp_path: Path) -> None:
    profile = load_profile(path)
    assert {name: getattr(profile, name) for name in COEFFICIENTS} == pytest.approx(
        fit(profile.points), rel=1e-2
    )
    copy = Path(shutil.copy(path, tmp_path))
    refit(copy)
    assert load_profile(copy).points == profile.points
    assert profile.source
    assert profile.licence


def test_known_coefficients_are_found_again() -> None:
    known = (10.0, 0.1, 1e-5, 0.5, 1e-4)
    shapes = [
        *(Point(num_prompts=1, prompt_tokens=n, ms=1) for n in (100, 1000, 5000, 20000)),
        *(Point(num_decodes=n, context_tokens=c, ms=1) for n in (1, 8, 64) for c in (100, 9000)),
    ]
    points = tuple(
        point.model_copy(
            update={"ms": sum(a * b for a, b in zip(known, point.features(), strict=True))}
        )
        for point in shapes
    )
    assert fit(points) == pytest.approx(dict(zip(COEFFICIENTS, known, strict=True)), rel=1e-3)


def test_what_points_cannot_tell_apart_stays_zero() -> None:
    """All contexts of one length: the cost of a context cannot be told from that of a request."""
    points = tuple(Point(num_decodes=n, context_tokens=50, ms=5 + n) for n in (1, 2, 10))
    found = fit(points)
    assert found["ms_per_context_token"] == 0
    assert found["ms_per_prompt_token"] == found["ms_per_pair"] == 0
    assert found["ms_per_decode"] == pytest.approx(1)


def test_pairs_of_chunks_are_those_of_the_whole() -> None:
    assert pairs_of(0, 3) == 1 + 2 + 3
    assert pairs_of(0, 100) == pairs_of(0, 30) + pairs_of(30, 70)


def test_a_missing_profile_names_those_there_are() -> None:
    with pytest.raises(ConfigError, match="smollm2-2-cores"):
        load_profile(FOLDER / "nothing.json")
