"""A publisher of KV events that can lose some: the sockets are real, the engine is not."""

from __future__ import annotations

import threading
from collections import deque
from typing import Self

import zmq

from xllm_plugin.service.kv_index.wire import END_OF_REPLAY

__all__ = ["FakePublisher"]


class FakePublisher:
    """Publishes as `vllm.distributed.kv_events.ZmqEventPublisher` does, on loopback.

    Args:
        replays: answers on a replay endpoint.
        keeps: so many batches for it.
    """

    def __init__(self, *, replays: bool = True, keeps: int = 10_000) -> None:
        self._context = zmq.Context()
        self._publisher = self._context.socket(zmq.PUB)
        self._publisher.setsockopt(zmq.LINGER, 0)
        self.endpoint = f"tcp://127.0.0.1:{self._publisher.bind_to_random_port('tcp://127.0.0.1')}"
        self.replay_endpoint: str | None = None
        self._kept: deque[tuple[int, bytes]] = deque(maxlen=keeps)
        self._sequence = 0
        self._stopping = threading.Event()
        self._thread: threading.Thread | None = None
        if replays:
            router = self._context.socket(zmq.ROUTER)
            router.setsockopt(zmq.LINGER, 0)
            port = router.bind_to_random_port("tcp://127.0.0.1")
            self.replay_endpoint = f"tcp://127.0.0.1:{port}"
            self._thread = threading.Thread(target=self._answer, args=(router,), daemon=True)

    def __enter__(self) -> Self:
        if self._thread is not None:
            self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stopping.set()
        if self._thread is not None:
            self._thread.join()
        self._publisher.close()
        self._context.term()

    def publish(self, payload: bytes, *, lose: bool = False) -> None:
        """Publish one batch; one that is lost can still be replayed."""
        self._kept.append((self._sequence, payload))
        if not lose:
            self._publisher.send_multipart((b"", self._sequence.to_bytes(8, "big"), payload))
        self._sequence += 1

    def send(self, sequence: int, payload: bytes) -> None:
        """Publish a batch under any number; it cannot be replayed."""
        self.send_raw(b"", sequence.to_bytes(8, "big"), payload)

    def send_raw(self, *frames: bytes) -> None:
        """Publish anything."""
        self._publisher.send_multipart(frames)

    def _answer(self, router: zmq.Socket[bytes]) -> None:
        with router:
            while not self._stopping.is_set():
                if not router.poll(20):
                    continue
                client, _, start = router.recv_multipart()
                for sequence, payload in tuple(self._kept):
                    if sequence >= int.from_bytes(start, "big"):
                        number = sequence.to_bytes(8, "big")
                        router.send_multipart((client, b"", b"", number, payload))
                router.send_multipart((client, b"", b"", END_OF_REPLAY, b""))
