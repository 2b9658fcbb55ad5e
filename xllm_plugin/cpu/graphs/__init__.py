"""Full graph mode on a CPU: the whole model compiled once, in the background, and kept on disk.

For the models whose layers do not run as native code (`xllm_plugin.cpu.native`).  vLLM compiles
them before the first answer, at every start: in CPU mode its loader rejects its own cache.  Here
eager answers at once; `compiler` is a child process of the lowest priority that compiles with
vLLM's own ahead-of-time path; `store` keeps what came out; `artefact` binds it to the model that
serves; `background` owns these steps.  One graph takes every batch size.
"""

from __future__ import annotations
