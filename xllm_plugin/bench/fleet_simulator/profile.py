"""How long a step of an instance takes: a sum of five terms, fitted to measured steps.

A profile is a JSON file with the measured points, where they come from, and the coefficients that
follow from them (`fit`; `python -m xllm_plugin.bench.fleet_simulator.profile FILE` writes them into
it).  A test fits every committed profile again and compares.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Final

import pydantic
from pydantic import BaseModel, ConfigDict, Field

from xllm_plugin.bench.files import write_atomically
from xllm_plugin.errors import ConfigError

__all__ = ["COEFFICIENTS", "Point", "StepProfile", "fit", "load_profile", "pairs_of", "refit"]

COEFFICIENTS: Final = (
    "base_ms",
    "ms_per_prompt_token",
    "ms_per_pair",
    "ms_per_decode",
    "ms_per_context_token",
)


class _Record(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class Point(_Record):
    """One measured step: whole prompts, or one token each for requests with a context."""

    num_prompts: int = Field(default=0, ge=0)
    prompt_tokens: int = Field(default=0, ge=0, description="of each")
    num_decodes: int = Field(default=0, ge=0)
    context_tokens: int = Field(default=0, ge=0, description="of each")
    ms: float = Field(gt=0, description="median of the repeats")
    is_fitted: bool = Field(default=True, description="or only compared with the fit")

    def features(self) -> tuple[float, ...]:
        """What each coefficient is multiplied with."""
        return (
            1.0,
            float(self.num_prompts * self.prompt_tokens),
            self.num_prompts * pairs_of(0, self.prompt_tokens),
            float(self.num_decodes),
            float(self.num_decodes * self.context_tokens),
        )


class StepProfile(_Record):
    """An instance: model, device, limits.  Times in ms, lengths in tokens."""

    name: str
    what: str = Field(description="model and device, for people")
    source: str = Field(description="who measured it, where it is published")
    licence: str
    changed: str = Field(description="what was done to the source's figures")
    kv_tokens: int = Field(gt=0, description="that fit into the KV cache")
    kv_tokens_from: str = Field(description="how that follows")
    max_step_tokens: int = Field(gt=0, description="--max-num-batched-tokens")
    max_requests: int = Field(gt=0, description="--max-num-seqs")
    base_ms: float = Field(ge=0)
    ms_per_prompt_token: float = Field(ge=0)
    ms_per_pair: float = Field(ge=0, description="of a prompt's token and one before it")
    ms_per_decode: float = Field(ge=0)
    ms_per_context_token: float = Field(ge=0, description="of requests that decode")
    points: tuple[Point, ...] = ()

    def step_s(
        self, prompt_tokens: int, pairs: float, num_decodes: int, context_tokens: int
    ) -> float:
        """Seconds of a step with so much in it."""
        return 1e-3 * (
            self.base_ms
            + self.ms_per_prompt_token * prompt_tokens
            + self.ms_per_pair * pairs
            + self.ms_per_decode * num_decodes
            + self.ms_per_context_token * context_tokens
        )

    def prefill_s(self, prompt_tokens: int, cached_tokens: int = 0) -> float:
        """Seconds until an idle instance has computed a prompt, chunk by chunk."""
        todo = prompt_tokens - cached_tokens
        num_steps = -(-todo // self.max_step_tokens)
        pairs = pairs_of(cached_tokens, todo)
        return self.step_s(todo, pairs, 0, 0) + (num_steps - 1) * 1e-3 * self.base_ms

    def errors(self) -> list[float]:
        """Relative error of the prediction of each point."""
        found = []
        for point in self.points:
            _, tokens, pairs, decodes, context = point.features()
            predicted_s = self.step_s(int(tokens), pairs, int(decodes), int(context))
            found.append(predicted_s * 1e3 / point.ms - 1)
        return found


def pairs_of(start: int, num_tokens: int) -> float:
    """Pairs of query and key when `num_tokens` are computed after `start` others."""
    return num_tokens * (start + (num_tokens + 1) / 2)


def load_profile(path: Path) -> StepProfile:
    """Read a profile.  Raises `ConfigError` when there is none or it is not one."""
    try:
        return StepProfile.model_validate_json(path.read_bytes())
    except FileNotFoundError as error:
        known = ", ".join(sorted(file.stem for file in path.parent.glob("*.json")))
        raise ConfigError(f"no profile {path.stem!r}; there are {known or 'none'}") from error
    except pydantic.ValidationError as error:
        raise ConfigError(f"{path} is not a step profile: {error}") from error


def fit(points: tuple[Point, ...]) -> dict[str, float]:
    """Coefficients of least squared relative error, none negative.

    Points that are only to be compared are left out.  A negative coefficient is dropped and the
    rest fitted again, the most negative first: five columns need no better method.
    """
    import numpy as np

    points = tuple(point for point in points if point.is_fitted)
    rows = np.array([point.features() for point in points])
    scaled = rows / np.array([[point.ms] for point in points])
    widths = np.linalg.norm(scaled, axis=0)
    unit = scaled / np.where(widths > 0, widths, 1.0)
    used: list[int] = []
    for column in range(len(COEFFICIENTS)):
        # What the points cannot tell from the columns before it stays 0.
        if np.linalg.matrix_rank(unit[:, [*used, column]], tol=1e-6) > len(used):
            used.append(column)
    while used:
        found = np.linalg.lstsq(unit[:, used], np.ones(len(points)), rcond=None)[0]
        if (found >= 0).all():
            values = dict(zip(used, found / widths[used], strict=True))
            return {
                name: float(f"{values.get(column, 0.0):.4g}")
                for column, name in enumerate(COEFFICIENTS)
            }
        used.pop(int(np.argmin(found)))
    raise ConfigError("no coefficient is left; give points with times above 0")


def refit(path: Path) -> None:
    """Write the coefficients that follow from a profile's points into its file."""
    profile = load_profile(path)
    record = profile.model_dump(exclude={"points"}) | fit(profile.points)
    lines = [json.dumps(point.model_dump(exclude_defaults=True)) for point in profile.points]
    head = json.dumps(record, indent=1).removesuffix("\n}")
    points = ",\n  ".join(lines)
    write_atomically(path, f'{head},\n "points": [\n  {points}\n ]\n}}\n')


if __name__ == "__main__":
    for name in sys.argv[1:]:
        refit(Path(name))
