"""The executors that the platform names exist, and are vLLM's with ours in front."""

from __future__ import annotations

import importlib
from typing import Any

import pytest

from xllm_plugin import shims
from xllm_plugin.accelerator.platform import EXECUTORS

pytestmark = pytest.mark.engine  # imports vLLM, some seconds


@pytest.fixture(scope="module", autouse=True)
def _vllm() -> None:
    shims.install()
    pytest.importorskip("vllm")


def load(path: str) -> Any:
    module_name, _, name = path.rpartition(".")
    return getattr(importlib.import_module(module_name), name)


@pytest.mark.parametrize(
    ("backend", "base"),
    [
        ("mp", "vllm.v1.executor.multiproc_executor.MultiprocExecutor"),
        ("uni", "vllm.v1.executor.uniproc_executor.UniProcExecutor"),
    ],
)
def test_each_backend_has_an_executor_of_ours(backend: str, base: str) -> None:
    executor = load(EXECUTORS[backend])
    mixin = load("xllm_plugin.worker.executor.XllmExecutorMixin")
    assert executor.__mro__.index(mixin) < executor.__mro__.index(load(base))
    assert executor.supports_pp == load(base).supports_pp
