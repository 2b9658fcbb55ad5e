"""The thread that does the pool's work that is not urgent: map ahead, unmap late, release."""

from __future__ import annotations

import threading
from typing import Self

from xllm_plugin.errors import NotNowError
from xllm_plugin.xtensor.page_pool import PagePool

__all__ = ["PoolKeeper"]


class PoolKeeper:
    """Calls `PagePool.maintain` when there is reason to, and at least every `interval_s`.

    A context: the thread runs inside.  If the pool fails it, the thread ends and the pool raises
    that failure to whoever calls it next.

    Args:
        pool: to be kept.
        interval_s: how often unused pages and fences are looked at when nobody calls.
    """

    def __init__(self, pool: PagePool, *, interval_s: float = 1.0) -> None:
        self._pool = pool
        self._interval_s = interval_s
        self._wanted = threading.Event()
        self._stopping = False
        # A daemon: a process that ends in an error must not wait for it.
        self._thread = threading.Thread(target=self._run, name="xllm-page-keeper", daemon=True)

    def __enter__(self) -> Self:
        self._pool.on_change = self._wanted.set
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stopping = True
        self._wanted.set()
        self._thread.join()
        self._pool.on_change = lambda: None

    def _run(self) -> None:
        try:
            while not self._stopping:
                self._keep()
                self._wanted.wait(self._interval_s)
                self._wanted.clear()
        except BaseException as error:  # noqa: BLE001 - carried to the pool's callers
            self._pool.fail(error)

    def _keep(self) -> None:
        try:
            self._pool.maintain()
        except NotNowError:
            # The kernel has no room to split a mapping, or takes no memory back; the next round
            # tries again.
            return
