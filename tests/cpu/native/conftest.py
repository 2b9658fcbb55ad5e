"""The kernels, built once a session; machines without the instructions skip."""

from __future__ import annotations

from typing import Any

import pytest

from xllm_plugin import shims


@pytest.fixture(scope="session")
def kernels(tmp_path_factory: pytest.TempPathFactory) -> Any:
    shims.install()
    torch = pytest.importorskip("torch")
    if not torch.cpu._is_avx512_bf16_supported():
        pytest.skip("this processor has no AVX512-BF16")
    from xllm_plugin.cpu.native.build import NativeBuildError, built_library, find_compiler
    from xllm_plugin.cpu.native.library import Kernels

    if find_compiler() is None:
        pytest.skip("there is no C++ compiler")
    try:
        return Kernels(built_library(tmp_path_factory.mktemp("native")))
    except NativeBuildError as error:
        pytest.fail(str(error))
