"""The library of the native layers, built once a machine; see `xllm_plugin.native_library`."""

from __future__ import annotations

import contextlib
import threading
from pathlib import Path

from xllm_plugin.models.cache import ModelCache
from xllm_plugin.native_library import NativeBuildError, NativeLibrary

__all__ = ["KERNELS", "NativeBuildError", "built_library", "early_build", "find_compiler"]

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
    early_build.wait()
    return KERNELS.built(root or _cache())


def may_run_here() -> bool:
    """Whether this processor is one for the kernels, as `choice.refusal` says, without torch."""
    try:
        flags = Path("/proc/cpuinfo").read_text(encoding="ascii", errors="replace")
    except OSError:
        return False
    return "avx512_bf16" in flags and "amx_tile" not in flags


class EarlyBuild:
    """The first build on a machine, while a server's imports leave all cores but one idle."""

    def __init__(self) -> None:
        self._thread: threading.Thread | None = None

    def begin(self) -> None:
        """Build in a thread, which waits for the compiler.  Safe to repeat."""
        if self._thread is None and may_run_here():
            # A server that ends in a usage error does not wait for it.
            self._thread = threading.Thread(target=self._build, name="xllm-kernels", daemon=True)
            self._thread.start()

    def _build(self) -> None:
        # Whoever needs the library asks `built_library`, and is told.
        with contextlib.suppress(NativeBuildError):
            KERNELS.built(_cache())

    def wait(self) -> None:
        """Return when no build is going on: a process must not be forked meanwhile."""
        if self._thread is not None:
            self._thread.join()


# Of this process, as the cache is of this machine.
early_build = EarlyBuild()


def _cache() -> Path:
    return ModelCache.at().root / "native"
