"""What the emulated device computes: aten by the CPU's kernels, npu operators in plain torch.

`load` is an entry point of torch (group ``torch.backends``), so `import torch` calls it in every
process that `Emulator.environment` was given to.
"""

from __future__ import annotations

__all__ = ["load"]


def load() -> None:
    """Put the emulated operators over torch_npu's own; safe to repeat."""
    import torch_npu  # noqa: F401  registers the device and the schemas

    from xllm_plugin.testing.cann.device import fallback, operators

    fallback.register()
    operators.register()
