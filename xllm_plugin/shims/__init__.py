"""The repairs of the surroundings that even `--platform native` needs.

They change nothing in vLLM: one answers a question about package metadata, the others let the CUDA
builds of torchvision, torchaudio and torchcodec that PyPI has stand beside CPU torch.  Each checks
that it is needed before it does anything.
"""

from __future__ import annotations

from xllm_plugin.shims import metadata, torchaudio, torchcodec, torchvision

__all__ = ["install"]


def install() -> None:
    """Install all of them.  Safe to repeat."""
    metadata.install()
    torchvision.install()
    torchaudio.install()
    torchcodec.install()
