"""The list of files that makes a model folder provable: `xllm-model.json`.

Checking sizes and modification times costs microseconds and is done at every use.  A file whose
time differs is hashed, so a folder that was copied passes and one that was changed does not.
"""

from __future__ import annotations

import hashlib
import json
import os
from dataclasses import dataclass
from pathlib import Path

from xllm_plugin.models.catalog import CATALOG, Recipe

__all__ = ["FILE_NAME", "FileRecord", "Manifest", "damage", "sha256_of_file"]

FILE_NAME = "xllm-model.json"
FORMAT = 1


@dataclass(frozen=True, slots=True)
class FileRecord:
    """One file of a model folder, as it was when the folder was finished."""

    size_bytes: int
    mtime_ns: int
    sha256: str


@dataclass(frozen=True, slots=True)
class Manifest:
    """What a model folder was made from and what it holds."""

    name: str
    recipe_version: int
    sources: dict[str, str]
    files: dict[str, FileRecord]

    @classmethod
    def of_folder(cls, folder: Path, recipe: Recipe) -> Manifest:
        """Describe the files that lie in `folder` now."""
        names = sorted(p.name for p in folder.iterdir() if p.is_file() and p.name != FILE_NAME)
        files = {}
        for name in names:
            stat = (folder / name).stat()
            digest = sha256_of_file(folder / name)
            files[name] = FileRecord(stat.st_size, stat.st_mtime_ns, digest)
        return cls(recipe.name, recipe.version, _sources(recipe), files)

    @classmethod
    def read(cls, folder: Path) -> Manifest:
        """Read the manifest of `folder`.

        Raises:
            ValueError: it is absent or not understood.
        """
        try:
            stored = json.loads((folder / FILE_NAME).read_text("utf-8"))
            files = {name: FileRecord(**record) for name, record in stored["files"].items()}
            manifest = cls(stored["name"], stored["recipe_version"], stored["sources"], files)
        except (OSError, ValueError, LookupError, TypeError, AttributeError) as error:
            raise ValueError(f"{FILE_NAME} is not readable ({error!r})") from error
        if stored.get("format") != FORMAT:
            raise ValueError(f"{FILE_NAME} has format {stored.get('format')}, not {FORMAT}")
        return manifest

    def write(self, folder: Path) -> None:
        """Write or replace the manifest of `folder` by one rename."""
        stored = {
            "format": FORMAT,
            "name": self.name,
            "recipe_version": self.recipe_version,
            "sources": self.sources,
            "files": {
                name: {"size_bytes": r.size_bytes, "mtime_ns": r.mtime_ns, "sha256": r.sha256}
                for name, r in self.files.items()
            },
        }
        temporary = folder / f".{FILE_NAME}.{os.getpid()}"
        temporary.write_text(json.dumps(stored, indent=1) + "\n", "utf-8")
        temporary.replace(folder / FILE_NAME)


def damage(folder: Path, recipe: Recipe, *, verify: bool = False) -> str | None:
    """Say what is wrong with the finished `folder`, or None when it is as it was made.

    Args:
        folder: the model folder; need not exist.
        recipe: what it should hold.
        verify: hash every file; otherwise only those whose modification time has changed.
    """
    try:
        manifest = Manifest.read(folder)
    except ValueError as error:
        return str(error)
    if manifest.recipe_version != recipe.version or manifest.sources != _sources(recipe):
        return "it was made from other sources or by another version of its recipe"
    for name, record in manifest.files.items():
        if (wrong := _file_damage(folder / name, record, verify=verify)) is not None:
            return f"{name} {wrong}"
    return None


def _file_damage(path: Path, record: FileRecord, *, verify: bool) -> str | None:
    try:
        stat = path.stat()
    except OSError:
        return "is missing"
    if stat.st_size != record.size_bytes:
        return f"has {stat.st_size:,} bytes, not {record.size_bytes:,}"
    if (verify or stat.st_mtime_ns != record.mtime_ns) and sha256_of_file(path) != record.sha256:
        return "has changed (its sha256 differs)"
    return None


def sha256_of_file(path: Path) -> str:
    """Return the hexadecimal sha256 of a file's content."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _sources(recipe: Recipe) -> dict[str, str]:
    """Return what went in: {requirement: sha256} of wheels, and the models built upon."""
    wheels = recipe.gguf.pieces if recipe.gguf else ()
    return {wheel.requirement: wheel.sha256 for wheel, _ in wheels} | {
        f"model {name}": f"recipe {CATALOG[name].version}" for name in recipe.requires
    }
