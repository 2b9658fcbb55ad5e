"""A schedule becomes device work: executor, worker and runner, whatever the device."""

from __future__ import annotations
