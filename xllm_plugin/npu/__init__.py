"""Ascend devices, through torch_npu; run on the emulator only so far, on no hardware.

See docs/npu.md, and `xllm_plugin.testing.cann` for the emulator.
"""
