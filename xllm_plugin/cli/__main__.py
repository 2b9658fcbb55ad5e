"""`python -m xllm_plugin.cli` is `xllm`."""

from __future__ import annotations

from xllm_plugin.cli import main

if __name__ == "__main__":
    main()
