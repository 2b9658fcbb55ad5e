"""Which requests run in this step."""

from __future__ import annotations
