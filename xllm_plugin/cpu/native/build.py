"""The library of the native layers, built once a machine; see `xllm_plugin.native_library`."""

from __future__ import annotations

from pathlib import Path

from xllm_plugin.models.cache import ModelCache
from xllm_plugin.native_library import NativeBuildError, NativeLibrary

__all__ = ["KERNELS", "NativeBuildError", "built_library", "find_compiler"]

KERNELS = NativeLibrary(
    what="kernels",
    name="kernels.so",
    language="C++",
    compilers=("CXX", "g++", "c++", "clang++"),
    folder=Path(__file__).parent,
    compiled=("decoder.cpp",),
    included=("attention.h", "gemm.h", "vector.h"),
    # The instructions the kernels name, and no more: other machines may see the cache's disk.
    flags=(
        "-O3",
        "-std=c++17",
        "-fPIC",
        "-shared",
        "-fopenmp",
        "-mavx512f",
        "-mavx512bw",
        "-mavx512vl",
        "-mavx512dq",
        "-mavx512bf16",
        "-mfma",
    ),
)


def find_compiler() -> str | None:
    """Path of a C++ compiler: `$CXX`, else g++, c++ or clang++."""
    return KERNELS.find_compiler()


def built_library(root: Path | None = None) -> Path:
    """Return the library, building it first where the cache has none that is whole.

    Raises:
        NativeBuildError: there is no compiler, it refuses, or the cache cannot be written.
    """
    return KERNELS.built(root or ModelCache.at().root / "native")
