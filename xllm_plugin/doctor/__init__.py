"""What `xllm doctor` finds out: one immutable report, shown as text or JSON."""

from __future__ import annotations

from xllm_plugin.doctor.machine import Finding
from xllm_plugin.doctor.report import Report, examine

__all__ = ["Finding", "Report", "examine"]
