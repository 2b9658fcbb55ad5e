"""The package can be imported where no engine is installed, at no cost."""

from __future__ import annotations

import subprocess
import sys

import xllm_plugin.models


def test_import_is_light() -> None:
    code = (
        "import sys, xllm_plugin.models, xllm_plugin.cli.model;"
        "heavy = {'torch', 'transformers', 'numpy', 'gguf', 'httpx', 'rich'};"
        "sys.exit(', '.join(heavy & set(sys.modules)) or 0)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_public_names_are_sorted_and_exist() -> None:
    names = xllm_plugin.models.__all__
    assert names == sorted(names)
    assert all(hasattr(xllm_plugin.models, name) for name in names)
