"""An Ascend NPU in host memory: the real torch_npu over a CANN of ours.

What is real: torch_npu's wheel with its dispatcher, its operators' schemas, its allocator, streams
and events.  What is emulated: CANN's runtime below it (``runtime.c``), and the operators
themselves, in plain torch on the same memory (``device``).  So a wrong name, argument or tensor
fails as it would on a device; speed, rounding, and the order of asynchronous work are not a
device's.

torch_npu is never installed: installed without CANN it breaks every `import torch`.  Its wheel lies
unpacked in the cache, and a process that is to see the device is started with `environment`:

::

    make npu-emulator                               fetches the wheel (44 MB), builds, says how
    eval "$(python -m xllm_plugin.testing.cann)"    for this shell
    <cache>/cann/wheel-<sha256>/torch_npu/...       the wheel
    <cache>/cann/<key>/lib*.so                      the emulated CANN, one library under its names
"""

from __future__ import annotations

from xllm_plugin.testing.cann.prepare import (
    EMULATOR_WHEEL,
    Emulator,
    EmulatorUnavailableError,
    find_emulator,
    prepare_emulator,
)

__all__ = [
    "EMULATOR_WHEEL",
    "Emulator",
    "EmulatorUnavailableError",
    "find_emulator",
    "prepare_emulator",
]
