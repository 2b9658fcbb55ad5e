"""The vLLM server's side of an instance: what the API server says about the engines behind it.

It runs in vLLM's API-server processes, imports vLLM only where it is used, and reads engines only
through `xllm_plugin.channel`.
"""

from __future__ import annotations

__all__: list[str] = []
