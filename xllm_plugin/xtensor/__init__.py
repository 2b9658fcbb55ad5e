"""KV memory: virtual ranges over physical pages.

The scheduler's side decides (`slabs`, `block_pool`, `kv_cache`), the worker's side does (`memory`,
`range`, `page_pool`, `keeper`), and `messages` travel between them with the steps.  `layout` is how
both see vLLM's KV buffer.  With `xtensor.form=contiguous`, `request_ranges` and `contiguous` stand
in for `slabs` and `block_pool`.
"""

from __future__ import annotations
