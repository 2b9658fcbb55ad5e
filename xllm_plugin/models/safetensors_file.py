"""Write a safetensors file in bfloat16 from float32 arrays, one tensor at a time.

numpy has no bfloat16, so the `safetensors` package's numpy writer cannot make such a file, and its
torch writer wants all tensors in memory.  The format is a length, a JSON header and the bytes
(https://github.com/huggingface/safetensors#format); the package reads it back.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from math import prod
from pathlib import Path
from types import TracebackType
from typing import Self

import numpy as np
import numpy.typing as npt

__all__ = ["Bf16Writer", "to_bf16_bits"]

BF16_BYTES = 2
HEADER_ALIGNMENT_BYTES = 8


def to_bf16_bits(array: npt.NDArray[np.float32]) -> npt.NDArray[np.uint16]:
    """Round finite float32 values to bfloat16, ties to even; return the 16 bits of each."""
    bits = np.ascontiguousarray(array, np.float32).view(np.uint32)
    rounded = bits + np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1))
    return (rounded >> np.uint32(16)).astype("<u2")


class Bf16Writer:
    """A safetensors file being written.  Tensors must come in the order of `shapes`."""

    def __init__(self, path: Path, shapes: Mapping[str, tuple[int, ...]]) -> None:
        self._shapes = dict(shapes)
        self._waiting = list(shapes)
        self._file = path.open("wb")
        self._write_header()

    def _write_header(self) -> None:
        header: dict[str, object] = {"__metadata__": {"format": "pt"}}
        offset = 0
        for name, shape in self._shapes.items():
            end = offset + BF16_BYTES * prod(shape)
            header[name] = {"dtype": "BF16", "shape": list(shape), "data_offsets": [offset, end]}
            offset = end
        text = json.dumps(header, separators=(",", ":")).encode()
        text += b" " * (-len(text) % HEADER_ALIGNMENT_BYTES)
        self._file.write(len(text).to_bytes(8, "little") + text)

    def write(self, name: str, array: npt.NDArray[np.float32]) -> None:
        """Append one tensor, which must be the next one announced and of the announced shape."""
        expected = self._waiting.pop(0)
        if (name, array.shape) != (expected, self._shapes[expected]):
            raise ValueError(
                f"got tensor {name} {array.shape}, expected {expected} {self._shapes[expected]}"
            )
        self._file.write(to_bf16_bits(array).tobytes())

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._file.close()
        if kind is None and self._waiting:
            raise ValueError(f"tensors announced and not written: {self._waiting}")
