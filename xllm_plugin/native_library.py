"""From C or C++ sources of this package to a checked library in the cache folder.

::

    <root>/<key>/NAME         appears by one rename, never half-written
    <root>/<key>/NAME.sha256  what it has to be

The key covers the sources, the flags and the compiler, so another version builds beside this one.
"""

from __future__ import annotations

import hashlib
import logging
import os
import shutil
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path

from xllm_plugin.errors import XllmError
from xllm_plugin.models.manifest import sha256_of_file

__all__ = ["NativeBuildError", "NativeLibrary"]

logger = logging.getLogger("vllm.xllm_plugin")

BUILD_TIMEOUT_S = 120


class NativeBuildError(XllmError):
    """A library cannot be built here."""


@dataclass(frozen=True, slots=True)
class NativeLibrary:
    """What a library is made of.

    Attributes:
        what: it in words, for messages.
        name: its file name.
        language: "C" or "C++".
        compilers: an environment variable, then programs, in the order in which they are tried.
        folder: where the sources lie.
        compiled: those given to the compiler.
        included: those that the compiler finds by itself.
        flags: given to the compiler before the sources.
    """

    what: str
    name: str
    language: str
    compilers: tuple[str, ...]
    folder: Path
    compiled: tuple[str, ...]
    included: tuple[str, ...]
    flags: tuple[str, ...]

    def find_compiler(self) -> str | None:
        """Path of the first compiler that is there."""
        variable, *programs = self.compilers
        names = (os.environ.get(variable), *programs)
        return next((found for name in names if name and (found := shutil.which(name))), None)

    def built(self, root: Path) -> Path:
        """Return the library, building it first where `root` has none that is whole.

        Raises:
            NativeBuildError: there is no compiler, it refuses, or `root` cannot be written.
        """
        compiler = self.find_compiler()
        if compiler is None:
            variable, *programs = self.compilers
            raise NativeBuildError(
                f"no {self.language} compiler was found (looked for ${variable}, "
                f"{', '.join(programs)}). Install one, such as the package {programs[0]}."
            )
        library = root / self._key(compiler) / self.name
        if not _is_whole(library):
            self._build(compiler, library)
        return library

    def _key(self, compiler: str) -> str:
        digest = hashlib.sha256()
        for name in (*self.compiled, *self.included):
            digest.update((self.folder / name).read_bytes())
        version = self._run([compiler, "--version"]).stdout
        digest.update("\0".join((*self.flags, version)).encode())
        return digest.hexdigest()[:16]

    def _build(self, compiler: str, library: Path) -> None:
        sources = [str(self.folder / name) for name in self.compiled]
        try:
            library.parent.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryDirectory(dir=library.parent) as folder:
                part = Path(folder, library.name)
                self._run([compiler, *self.flags, "-o", str(part), *sources])
                checksum = _checksum_file(part)
                checksum.write_text(sha256_of_file(part), encoding="ascii")
                # Two processes that build at once make the same library; either may win.
                part.replace(library)
                checksum.replace(_checksum_file(library))
        except OSError as error:
            raise NativeBuildError(
                f"{library.parent} cannot be written ({error}). Name another folder: "
                "XLLM_CACHE_DIR."
            ) from error
        logger.info("xllm-plugin: %s built: %s", self.what, library)

    def _run(self, command: list[str]) -> subprocess.CompletedProcess[str]:
        try:
            return subprocess.run(
                command, capture_output=True, text=True, check=True, timeout=BUILD_TIMEOUT_S
            )
        except subprocess.CalledProcessError as error:
            last = (error.stderr or "").strip().splitlines()[-1:]
            raise NativeBuildError(
                f"{command[0]} refused the {self.what}: {' '.join(last)}"
            ) from error
        except (OSError, subprocess.TimeoutExpired) as error:
            raise NativeBuildError(f"{command[0]} could not be run: {error}") from error


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
