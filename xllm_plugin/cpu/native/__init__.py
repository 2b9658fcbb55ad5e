"""Decoder layers as native code: partial graph mode (arXiv 2510.14686, 4.2) on a CPU.

A layer becomes two calls around vLLM's attention.  Nothing is traced or compiled per model: one
library of a few kernels, built once a machine (`build.py`), serves every supported model at any
batch shape from the first step on.

* `decoder.cpp`, `gemm.h`, `vector.h`: the kernels.
* `build.py`: from source to a checked library in the cache.
* `library.py`: its functions, for Python.
* `linear.py`: linear layers over packed weights, put where vLLM packs its own.
* `layers.py`: which layers are taken over, and what they do instead.
"""

from __future__ import annotations
