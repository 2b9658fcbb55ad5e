"""Adaptive graph mode: whether a step's work is launched whole or operator by operator.

`mode` has the nouns, `buckets` learns padded sizes from the traffic, `policy` has the choices as
pure functions, and `cache` applies them to a device's `GraphBackend`.
"""

from __future__ import annotations
