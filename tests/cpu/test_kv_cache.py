"""The KV cache's memory is zero and is not touched before it is used."""

from __future__ import annotations

import gc

import pytest

torch = pytest.importorskip("torch")
psutil = pytest.importorskip("psutil")

from xllm_plugin.cpu.kv_cache import (  # noqa: E402
    MIN_BYTES,
    ElasticBuffer,
    ZeroOnFirstUse,
    elastic_memory,
)
from xllm_plugin.errors import ConfigError, InternalError  # noqa: E402
from xllm_plugin.xtensor.config import XTensorConfig  # noqa: E402
from xllm_plugin.xtensor.layout import Column, KVLayout  # noqa: E402
from xllm_plugin.xtensor.messages import MemoryChange  # noqa: E402

BLOCK = 3 * 2**14  # of which the largest power of two is 16 KiB
NUM_BLOCKS = 20_000  # 1.8 GiB of addresses
LAYOUT = KVLayout(NUM_BLOCKS, (Column(0, BLOCK), Column(NUM_BLOCKS * BLOCK, BLOCK)))


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


def rss_of_pages() -> int:
    """Bytes of the driver's file that this process has in memory."""
    return sum(m.rss for m in psutil.Process().memory_maps() if "memfd:xllm-pages" in m.path)


def test_an_elastic_buffer_has_the_memory_of_its_committed_slabs() -> None:
    gc.collect()
    before = rss_of_pages()
    config = XTensorConfig(slab_blocks=2, keep_idle_s=0.0)
    memory, driver = elastic_memory(LAYOUT, config)
    assert driver.granularity_bytes == 2**14
    with ElasticBuffer(memory, driver):
        cache = torch.zeros(LAYOUT.num_bytes, dtype=torch.int8, device=torch.device("cpu"))
        assert torch.zeros(3, dtype=torch.int8).tolist() == [0, 0, 0]
    layers = cache.view(2, NUM_BLOCKS, BLOCK)
    assert rss_of_pages() == before
    slab_bytes = 2 * LAYOUT.block_bytes
    memory.apply(MemoryChange(budget_slabs=3, committed=(0, 5000, 7)))
    layers[:, 14:16] = 1
    layers[:, 10_001] = 2
    assert int(layers[:, 14:16].sum(dtype=torch.int64)) == slab_bytes
    assert rss_of_pages() - before == 3 * slab_bytes
    memory.apply(MemoryChange(budget_slabs=3, released=(5000,), committed=(9999,)))
    memory.pool.maintain()
    assert rss_of_pages() - before == 3 * slab_bytes
    assert int(layers[:, 14:16].sum(dtype=torch.int64)) == slab_bytes
    memory.apply(MemoryChange(budget_slabs=3, released=(0, 7, 9999)))
    memory.pool.maintain()
    assert rss_of_pages() == before


def test_vllm_has_to_ask_for_the_buffer_once() -> None:
    memory, driver = elastic_memory(LAYOUT, XTensorConfig())
    with pytest.raises(InternalError, match="asked 0 times"), ElasticBuffer(memory, driver):
        torch.zeros(LAYOUT.num_bytes + 1, dtype=torch.int8, device="meta")


def test_blocks_smaller_than_the_system_s_page_are_refused() -> None:
    with pytest.raises(ConfigError, match="--block-size"):
        elastic_memory(KVLayout(8, (Column(0, 3 * 2**10),)), XTensorConfig())
