"""KV memory: virtual ranges over physical pages.

So far the parts that stand alone, which no server uses yet: the KV cache of a running engine is
vLLM's.
"""

from __future__ import annotations
