"""From source to a checked library in the cache folder.

::

    <cache>/native/<key>/kernels.so         appears by one rename, never half-written
    <cache>/native/<key>/kernels.so.sha256  what it has to be

The key covers the sources, the flags and the compiler, so another version builds beside this one.
"""

from __future__ import annotations

import hashlib
import logging
import os
import shutil
import subprocess
import tempfile
from pathlib import Path

from xllm_plugin.errors import XllmError
from xllm_plugin.models.cache import ModelCache
from xllm_plugin.models.manifest import sha256_of_file

__all__ = ["NativeBuildError", "built_library", "find_compiler"]

logger = logging.getLogger("vllm.xllm_plugin")

FOLDER = Path(__file__).parent
SOURCES = ("decoder.cpp", "attention.h", "gemm.h", "vector.h")
# The instructions the kernels name, and no more: other machines may see the cache's disk.
FLAGS = (
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
)
BUILD_TIMEOUT_S = 120


class NativeBuildError(XllmError):
    """The kernels cannot be built here."""


def find_compiler() -> str | None:
    """Path of a C++ compiler: `$CXX`, else g++, c++ or clang++."""
    names = (os.environ.get("CXX"), "g++", "c++", "clang++")
    return next((found for name in names if name and (found := shutil.which(name))), None)


def built_library(root: Path | None = None) -> Path:
    """Return the library, building it first where the cache has none that is whole.

    Raises:
        NativeBuildError: there is no compiler, it refuses, or the cache cannot be written.
    """
    compiler = find_compiler()
    if compiler is None:
        raise NativeBuildError(
            "no C++ compiler was found (looked for $CXX, g++, c++, clang++). Install one, such as "
            "the package g++."
        )
    library = (root or ModelCache.at().root / "native") / _key(compiler) / "kernels.so"
    if not _is_whole(library):
        _build(compiler, library)
    return library


def _key(compiler: str) -> str:
    digest = hashlib.sha256()
    for name in SOURCES:
        digest.update((FOLDER / name).read_bytes())
    version = _run([compiler, "--version"]).stdout
    digest.update("\0".join((*FLAGS, version)).encode())
    return digest.hexdigest()[:16]


def _checksum_file(library: Path) -> Path:
    return library.with_name(library.name + ".sha256")


def _is_whole(library: Path) -> bool:
    try:
        expected = _checksum_file(library).read_text(encoding="ascii")
        found = sha256_of_file(library)
    except (OSError, UnicodeDecodeError):
        return False
    if found != expected:
        logger.warning("xllm-plugin: %s is damaged and is built again.", library)
    return found == expected


def _build(compiler: str, library: Path) -> None:
    try:
        library.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=library.parent) as folder:
            part = Path(folder, library.name)
            _run([compiler, *FLAGS, "-o", str(part), str(FOLDER / SOURCES[0])])
            checksum = _checksum_file(part)
            checksum.write_text(sha256_of_file(part), encoding="ascii")
            # Two processes that build at once make the same library; either may win.
            part.replace(library)
            checksum.replace(_checksum_file(library))
    except OSError as error:
        raise NativeBuildError(
            f"{library.parent} cannot be written ({error}). Name another folder: XLLM_CACHE_DIR."
        ) from error
    logger.info("xllm-plugin: native kernels built: %s", library)


def _run(command: list[str]) -> subprocess.CompletedProcess[str]:
    try:
        return subprocess.run(
            command, capture_output=True, text=True, check=True, timeout=BUILD_TIMEOUT_S
        )
    except subprocess.CalledProcessError as error:
        last = (error.stderr or "").strip().splitlines()[-1:]
        raise NativeBuildError(f"{command[0]} refused the kernels: {' '.join(last)}") from error
    except (OSError, subprocess.TimeoutExpired) as error:
        raise NativeBuildError(f"{command[0]} could not be run: {error}") from error
