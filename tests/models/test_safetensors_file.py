"""Files written here are read by the safetensors library and rounded as torch rounds."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from xllm_plugin.models.safetensors_file import Bf16Writer, to_bf16_bits


def test_rounding_is_torchs() -> None:
    """Ties to even, both signs, subnormals and values that round up to the next exponent."""
    random = np.random.default_rng(0).standard_normal(100_000).astype(np.float32)
    special = np.array([0.0, -0.0, 1.00390625, 1.01171875, 1e-40, 3.3e38, np.inf], np.float32)
    values = np.concatenate([random, special, -special])
    expected = torch.from_numpy(values).bfloat16().view(torch.uint16).numpy()
    assert np.array_equal(to_bf16_bits(values), expected)


def test_the_library_reads_the_file(tmp_path: Path) -> None:
    arrays = {"a": np.ones((2, 3), np.float32), "b.weight": np.arange(5, dtype=np.float32)}
    path = tmp_path / "model.safetensors"
    with Bf16Writer(path, {name: array.shape for name, array in arrays.items()}) as writer:
        for name, array in arrays.items():
            writer.write(name, array)
    read = load_file(path)
    assert list(read) == list(arrays)
    for name, array in arrays.items():
        assert read[name].dtype == torch.bfloat16
        assert torch.equal(read[name].float(), torch.from_numpy(array))


def test_wrong_order_shape_or_count_is_refused(tmp_path: Path) -> None:
    def write(name: str, shape: tuple[int, ...]) -> None:
        with Bf16Writer(tmp_path / "x", {"a": (2,), "b": (2,)}) as writer:
            writer.write(name, np.zeros(shape, np.float32))

    for name, shape in (("b", (2,)), ("a", (3,)), ("a", (2,))):
        with pytest.raises(ValueError, match="tensor"):
            write(name, shape)
