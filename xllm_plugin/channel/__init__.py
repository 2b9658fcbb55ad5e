"""The one channel to a running engine: snapshots out, control calls in.

vLLM offers no way from its API server to its scheduler, and none from outside to either.  The
engine process therefore listens on one Unix socket per data-parallel rank.  Everything that shows
or steers an engine (`/metrics`, `/xllm/*`, `xllm top`, heartbeats, admission) reads only this.

::

    engine thread                      server thread                    any process of this user
    EngineChannel.publish_if_due() --> latest snapshot  <-- snapshot -- ChannelClient
    EngineChannel.drain_calls()    <-- queued calls     <-- call ------ AsyncChannelClient

The socket has mode 0600 in a directory of mode 0700: whoever may open it may already end the
process.  Nothing here imports torch or vLLM.
"""

from __future__ import annotations

from xllm_plugin.channel.client import AsyncChannelClient, ChannelClient
from xllm_plugin.channel.config import ChannelConfig
from xllm_plugin.channel.engine import EngineChannel, ExponentialMean, SnapshotPublisher
from xllm_plugin.channel.messages import (
    CallInfo,
    EngineIdentity,
    EngineLoad,
    FrameError,
    Reading,
    Readings,
    Snapshot,
)
from xllm_plugin.channel.paths import EngineSocket, channel_directory, find_engines, socket_path
from xllm_plugin.channel.server import CallQueue, ChannelServer

__all__ = [
    "AsyncChannelClient",
    "CallInfo",
    "CallQueue",
    "ChannelClient",
    "ChannelConfig",
    "ChannelServer",
    "EngineChannel",
    "EngineIdentity",
    "EngineLoad",
    "EngineSocket",
    "ExponentialMean",
    "FrameError",
    "Reading",
    "Readings",
    "Snapshot",
    "SnapshotPublisher",
    "channel_directory",
    "find_engines",
    "socket_path",
]
