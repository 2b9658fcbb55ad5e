"""The cache folder: where models and wheels lie, and the locks that keep two processes apart.

::

    $XLLM_CACHE_DIR  or  $XDG_CACHE_HOME/xllm  or  ~/.cache/xllm
      models/NAME/           a finished model folder; appears by one rename, never half-written
      models/.NAME.*         a build in progress, or the rest of one that was killed
      wheels/FILE.whl        a downloaded wheel, whole and checked
      wheels/FILE.whl.part   the beginning of one, kept so that a download can be resumed
      locks/*.lock           one empty file for each thing that one process makes at a time
"""

from __future__ import annotations

import fcntl
import os
import secrets
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from xllm_plugin.errors import ModelError
from xllm_plugin.models.progress import Reporter

__all__ = ["ModelCache", "replace_folder"]


@dataclass(frozen=True, slots=True)
class ModelCache:
    """Paths below one cache folder.  Holds no state; two of the same root are the same cache."""

    root: Path

    @classmethod
    def at(cls, root: Path | str | None = None, env: Mapping[str, str] = os.environ) -> ModelCache:
        """Return the cache at `root`, or where the environment says it is."""
        if root is not None:
            chosen = Path(root)
        elif env.get("XLLM_CACHE_DIR"):
            chosen = Path(env["XLLM_CACHE_DIR"])
        elif env.get("XDG_CACHE_HOME"):
            chosen = Path(env["XDG_CACHE_HOME"]) / "xllm"
        else:
            chosen = Path("~/.cache/xllm")
        return cls(chosen.expanduser().absolute())

    @property
    def wheels(self) -> Path:
        """Return the folder of downloaded wheels."""
        return self.root / "wheels"

    def model(self, name: str) -> Path:
        """Return where the finished model `name` lies or will lie."""
        return self.root / "models" / name

    @contextmanager
    def lock(self, what: str, reporter: Reporter) -> Iterator[None]:
        """Hold the lock called `what`; says so when another process has it, and waits.

        The kernel frees the lock with the process, so a killed one leaves nothing to clean up.
        Lock files stay: removing one that somebody waits for would give two holders.

        Raises:
            ModelError: the cache folder cannot be written.
        """
        path = self.root / "locks" / f"{what}.lock"
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
        except OSError as error:
            raise ModelError(
                f"the cache folder {self.root} cannot be written ({error}); "
                "choose another with --cache-dir or XLLM_CACHE_DIR"
            ) from error
        try:
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                reporter.say(f"another process is preparing {what}; waiting for it")
                fcntl.flock(descriptor, fcntl.LOCK_EX)
            yield
        finally:
            os.close(descriptor)

    @contextmanager
    def building(self, name: str) -> Iterator[Path]:
        """Give an empty folder to build `name` in; on success it becomes the model by a rename.

        Call it with the lock of `name` held.  Whatever ends the block early, the folder is removed;
        what a killed process left is removed on entry.
        """
        target = self.model(name)
        target.parent.mkdir(parents=True, exist_ok=True)
        for leftover in target.parent.glob(f".{name}.*"):
            shutil.rmtree(leftover, ignore_errors=True)
        build = target.with_name(f".{name}.{secrets.token_hex(4)}")
        try:
            build.mkdir()
            yield build
            replace_folder(build, target)
        finally:
            shutil.rmtree(build, ignore_errors=True)


def replace_folder(new: Path, target: Path) -> None:
    """Rename `new` to `target`, moving aside and then removing what was there."""
    old = target.with_name(f"{new.name}.old")
    if target.exists():
        target.rename(old)
    try:
        new.rename(target)
    except OSError:
        if old.exists():
            old.rename(target)
        raise
    shutil.rmtree(old, ignore_errors=True)
