"""The KV cache's memory is zero and is not touched before it is used."""

from __future__ import annotations

import gc

import pytest

torch = pytest.importorskip("torch")
psutil = pytest.importorskip("psutil")

from xllm_plugin.cpu.kv_cache import MIN_BYTES, ZeroOnFirstUse  # noqa: E402


def resident_bytes() -> int:
    found: int = psutil.Process().memory_info().rss
    return found


def test_large_zeros_take_no_memory_until_they_are_written() -> None:
    before = resident_bytes()
    with ZeroOnFirstUse():
        cache = torch.zeros(16 * MIN_BYTES, dtype=torch.int8, device=torch.device("cpu"))
    assert resident_bytes() - before < MIN_BYTES
    assert cache.shape == (16 * MIN_BYTES,)
    assert not cache[:: MIN_BYTES // 2].any()
    cache[5] = 7
    assert cache[:8].tolist() == [0, 0, 0, 0, 0, 7, 0, 0]
    view = cache.view(torch.bfloat16)[:4]
    del cache
    gc.collect()
    assert view.shape == (4,), "a view keeps the memory"


@pytest.mark.parametrize("size", [(MIN_BYTES,), ((2, MIN_BYTES),), (2, MIN_BYTES)])
def test_every_form_of_a_size_is_understood(size: tuple[object, ...]) -> None:
    with ZeroOnFirstUse():
        assert torch.zeros(*size, dtype=torch.int8).shape == torch.zeros(*size, device="meta").shape


def test_other_tensors_are_torch_s() -> None:
    with ZeroOnFirstUse():
        assert torch.zeros(4, dtype=torch.int8).tolist() == [0, 0, 0, 0]
        assert torch.zeros(4).dtype == torch.float32
        assert torch.ones(4, dtype=torch.int8).tolist() == [1, 1, 1, 1]
        assert torch.zeros(2 * MIN_BYTES, dtype=torch.int8, device="meta").is_meta
