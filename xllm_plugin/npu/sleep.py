"""Sleep: a device's memory goes back to it, and comes when the engine wakes.

The mechanism behind `POST /sleep` and `/wake_up`; what vLLM's levels keep is vLLM's matter
(`Worker.sleep`).  At level 1 weights wait in the host's memory, at level 2 they are dropped, and
whoever wakes the engine loads them again (``reload_weights``); the KV cache is dropped at both.

Tensors stay, and their storages are emptied and filled again, as FSDP does with its parameters: so
every view is right afterwards, those of the KV cache above all.  Addresses may be others, so
captured graphs are dropped, and captured again when they are worth it.

What layers make of their weights when they are loaded (latent attention: two of its products) is
no parameter, and stays on the device.  What lies on the host (``--cpu-offload-gb``) stays there.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
import torch_npu  # noqa: F401  registers torch.npu
from vllm.device_allocator.sleep_mode_backend import SleepModeBackend

from xllm_plugin.errors import MisuseError, NotNowError

__all__ = ["NpuSleep"]

WEIGHTS, KV_CACHE = "weights", "kv_cache"


@dataclass(frozen=True, slots=True)
class Away:
    """A storage without memory.

    Attributes:
        storage: whose tensors are all there.
        num_bytes: that it had.
        kept: its bytes on the host; None where they were dropped.
    """

    storage: torch.UntypedStorage
    num_bytes: int
    kept: torch.Tensor | None


class NpuSleep(SleepModeBackend):
    """What of a worker is away; all calls come between two steps.

    Args:
        runner: the worker's, with model and KV cache in place.
    """

    def __init__(self, runner: Any) -> None:
        super().__init__()
        self._runner = runner
        self._away: dict[str, list[Away]] = {WEIGHTS: [], KV_CACHE: []}

    def suspend(self, level: int = 1) -> None:
        """Give the memory of weights and KV cache back.

        Raises:
            MisuseError: there is no such level.
        """
        if level not in {1, 2}:
            raise MisuseError(f"level={level}: give 1 (weights kept by the host) or 2 (dropped).")
        model = self._runner.get_model()
        tensors = list(model.parameters())
        if level == 1:
            tensors += model.buffers()  # at level 2 vLLM has a copy of these, and writes it back
        self._empty(WEIGHTS, tensors, keeps=level == 1)
        self.discard((KV_CACHE,))
        self._state = "SUSPENDED"

    def discard(self, tags: tuple[str, ...]) -> None:
        """Give the KV cache's memory back, and let the weights be.

        Raises:
            MisuseError: something else is asked for.
        """
        if set(tags) != {KV_CACHE}:
            raise MisuseError(f"tags={sorted(tags)}: only {KV_CACHE} can be discarded.")
        if self._runner.graphs is not None:
            self._runner.graphs.drop_all()
        self._empty(KV_CACHE, self._runner.kv_caches, keeps=False)
        torch.npu.empty_cache()

    def resume(self, tags: list[str] | None = None) -> None:
        """Take memory again, for the weights, the KV cache or both; of the weights also the bytes.

        Raises:
            MisuseError: there is no such tag.
            NotNowError: the device has no memory left; what is not back can be asked for again.
        """
        wanted = self._away.keys() if tags is None else set(tags)
        if not wanted <= self._away.keys():
            raise MisuseError(f"tags={sorted(wanted)}: give {WEIGHTS}, {KV_CACHE} or both.")
        for tag in sorted(wanted, reverse=True):  # weights first
            away = self._away[tag]
            while away:
                fill(away[-1])
                away.pop()
        if not any(self._away.values()):
            self._state = "RUNNING"

    def _empty(self, tag: str, tensors: Iterable[torch.Tensor], *, keeps: bool) -> None:
        found_there = (one.untyped_storage() for one in tensors if one.device.type == "npu")
        storages = {storage.data_ptr(): storage for storage in found_there}
        storages.pop(0, None)  # is away, or never had memory
        found = [
            Away(storage, storage.nbytes(), bytes_of(storage).cpu() if keeps else None)
            for storage in storages.values()
        ]
        for one in found:
            one.storage.resize_(0)
        self._away[tag] += found


def fill(away: Away) -> None:
    """Give a storage its memory, and the bytes that were kept.

    Raises:
        NotNowError: the device has none left.
    """
    try:
        away.storage.resize_(away.num_bytes)
    except torch.OutOfMemoryError as error:
        raise NotNowError(
            f"no memory for {away.num_bytes} bytes of a sleeping engine: {error}. Free memory of "
            "the device (`npu-smi info` names who holds it) and call /wake_up again."
        ) from error
    if away.kept is not None:
        bytes_of(away.storage).copy_(away.kept)


def bytes_of(storage: torch.UntypedStorage) -> torch.Tensor:
    """A tensor [bytes] over a storage."""
    empty = torch.empty(0, dtype=torch.int8, device=storage.device)
    return empty.set_(storage, 0, (storage.nbytes(),))
