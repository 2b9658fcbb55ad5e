"""Graph mode: whether work is launched whole instead of operator by operator."""

from __future__ import annotations
