"""The CPU family.  Every family has files of these names."""

from __future__ import annotations
