"""Ascend devices: so far their memory driver alone, which nothing uses yet.

There is no `accelerator.py` here, so this is no device family: `xllm doctor` does not list it and
no server can choose it.  It has met the emulator (`xllm_plugin.testing.cann`) and no device.
"""
