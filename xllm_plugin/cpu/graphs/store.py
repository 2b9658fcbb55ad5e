"""Compiled graphs on disk.

::

    <cache>/graphs/<key>/            appears by one rename, never half-written
      manifest.json                  what it was made from, and the sha256 of every other file
      model                          torch's serialised function; no weights
      inductor/**.so, .py            its kernels
    <cache>/graphs/.<key>.*          a compilation under way, or the rest of one that was killed
    <cache>/graphs/<key>.log         what the last compilation said
    <cache>/graphs/.<key>.lock       held by the process that compiles
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import logging
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from xllm_plugin.models.cache import ModelCache
from xllm_plugin.models.manifest import sha256_of_file

__all__ = ["GraphStore", "Manifest", "StoredGraph"]

logger = logging.getLogger("vllm.xllm_plugin")

MANIFEST = "manifest.json"
MODEL, INDUCTOR = "model", "inductor"
KERNELS = frozenset({".so", ".py", ".cpp", ".h"})
"""What of Inductor's folder is kept: kernels, and their sources, by which it finds them."""


@dataclass(frozen=True, slots=True)
class Manifest:
    """What a stored graph is.

    Attributes:
        facts: everything that it depends on, by name.
        files: sha256 by path, relative to the folder.
        module: name of the compiled module in the model.
        inputs: of each graph input its kind, and of a tensor shape and strides, None where they
            change with the batch; see `xllm_plugin.cpu.graphs.artefact.describe`.
        wall_s: that the process which compiled took, imports and loading included.
        cpu_s: processor time that it took.
        peak_bytes: memory that it took at most.
    """

    facts: dict[str, str]
    files: dict[str, str]
    module: str
    inputs: list[Any]
    wall_s: float
    cpu_s: float
    peak_bytes: int


@dataclass(frozen=True, slots=True)
class StoredGraph:
    """A whole graph in its folder."""

    folder: Path
    manifest: Manifest


class GraphStore:
    """The graphs of one cache folder; holds no state."""

    def __init__(self, root: Path | None = None) -> None:
        self.root = root or ModelCache.at().root / "graphs"

    def key(self, facts: Mapping[str, str]) -> str:
        """The folder's name for a graph made from `facts`."""
        return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:24]

    def log(self, key: str) -> Path:
        """Where the compilation of `key` writes what it has to say."""
        return self.root / f"{key}.log"

    def find(self, facts: Mapping[str, str]) -> StoredGraph | None:
        """The graph made from `facts`, or None; one that is damaged or foreign is removed."""
        folder = self.root / self.key(facts)
        if not folder.is_dir():
            return None
        why = None
        try:
            manifest = Manifest(**json.loads((folder / MANIFEST).read_text("utf-8")))
            why = _damage(folder, manifest)
            if why is None and manifest.facts != dict(facts):
                why = "it was made for something else"
        except (OSError, ValueError, TypeError) as error:
            why = f"its manifest cannot be read ({error})"
        if why is None:
            return StoredGraph(folder, manifest)
        self.discard(folder, why)
        return None

    def discard(self, folder: Path, why: str) -> None:
        """Remove a graph that cannot be used, and say so."""
        logger.warning("xllm-plugin: compiled graph %s is made again: %s.", folder, why)
        shutil.rmtree(folder, ignore_errors=True)

    @contextmanager
    def lock(self, key: str) -> Iterator[None]:
        """Wait until no other process builds `key`; the kernel frees the lock with the process."""
        self.root.mkdir(parents=True, exist_ok=True)
        with (self.root / f".{key}.lock").open("w", encoding="ascii") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            yield

    def begin(self, key: str) -> Path:
        """A folder to build `key` in, under its lock; what a killed process left goes."""
        self.root.mkdir(parents=True, exist_ok=True)
        for left in self.root.glob(f".{key}.*/"):
            shutil.rmtree(left, ignore_errors=True)
        return Path(tempfile.mkdtemp(dir=self.root, prefix=f".{key}."))

    def finish(self, building: Path, manifest: Manifest) -> StoredGraph:
        """Keep what a graph needs of `building`, and let it appear under its key."""
        for path in (building / INDUCTOR).rglob("*"):
            if path.is_file() and path.suffix not in KERNELS:
                path.unlink()
        files = {
            str(path.relative_to(building)): sha256_of_file(path)
            for path in sorted(building.rglob("*"))
            if path.is_file()
        }
        whole = Manifest(**asdict(manifest) | {"files": files})
        (building / MANIFEST).write_text(json.dumps(asdict(whole), indent=1), "utf-8")
        folder = self.root / self.key(whole.facts)
        # Whoever held the lock before has been looked for: what is there is damaged.
        shutil.rmtree(folder, ignore_errors=True)
        building.chmod(0o755)
        building.rename(folder)
        return StoredGraph(folder, whole)


def _damage(folder: Path, manifest: Manifest) -> str | None:
    """What of its files is not as it was; files that were added do not matter."""
    for name, expected in manifest.files.items():
        path = folder / name
        if not path.is_file():
            return f"{name} is missing"
        if sha256_of_file(path) != expected:
            return f"{name} is damaged"
    return None if MODEL in manifest.files else f"{MODEL} is not listed"
