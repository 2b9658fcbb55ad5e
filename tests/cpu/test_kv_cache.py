"""The KV cache's memory is zero and is not touched before it is used."""

from __future__ import annotations

import gc

import pytest

torch = pytest.importorskip("torch")
psutil = pytest.importorskip("psutil")

from xllm_plugin import shims  # noqa: E402
from xllm_plugin.cpu.kv_cache import (  # noqa: E402
    MIN_BYTES,
    ElasticBuffer,
    ZeroOnFirstUse,
    elastic_memory,
)
from xllm_plugin.cpu.testkit import FaultyVmCalls  # noqa: E402
from xllm_plugin.errors import InternalError, NotNowError  # noqa: E402
from xllm_plugin.xtensor.config import XTensorConfig  # noqa: E402
from xllm_plugin.xtensor.layout import Column, KVLayout, moved  # noqa: E402
from xllm_plugin.xtensor.messages import MemoryChange  # noqa: E402

BLOCK = 3 * 2**14  # no power of two, nor are two blocks
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
    memory, driver = elastic_memory(LAYOUT, config, full_blocks=1)
    assert driver.granularity_bytes == 2 * BLOCK, "a slab of two blocks is one page in a column"
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
    memory, driver = elastic_memory(LAYOUT, XTensorConfig(), full_blocks=1)
    with pytest.raises(InternalError, match="asked 0 times"), ElasticBuffer(memory, driver):
        torch.zeros(LAYOUT.num_bytes + 1, dtype=torch.int8, device="meta")


def test_blocks_that_are_no_whole_pages_come_and_go_together() -> None:
    """As those of latent attention; a column that would begin inside a page is moved."""
    gc.collect()
    before = rss_of_pages()
    block, num_blocks = 18 * 2**10, 65
    layout = KVLayout(num_blocks, (Column(0, block), Column(num_blocks * block, block)))
    memory, driver = elastic_memory(layout, XTensorConfig(keep_idle_s=0.0), full_blocks=1)
    placed = memory.range.layout
    with ElasticBuffer(memory, driver):
        cache = torch.zeros(placed.num_bytes, dtype=torch.int8)
    layers = [
        torch.as_strided(cache, (num_blocks, block), (block, 1), column.start_bytes)
        for column in placed.columns
    ]
    assert (memory.range.num_slabs, memory.range.pages_per_slab) == (32, 2)
    memory.apply(MemoryChange(budget_slabs=2, committed=(0, 31)))
    for layer in layers:
        layer[62:64] = 3
    assert [int(layer[62:64].sum(dtype=torch.int64)) for layer in layers] == [6 * block] * 2
    assert rss_of_pages() - before == 2 * 4 * block
    memory.apply(MemoryChange(budget_slabs=2, released=(0, 31)))
    memory.pool.maintain()
    assert rss_of_pages() == before


def test_ranges_of_requests_show_the_same_memory_twice() -> None:
    gc.collect()
    before = rss_of_pages()
    config = XTensorConfig(enabled=True, form="contiguous", slab_blocks=4, keep_idle_s=0.0)
    layout = KVLayout(64, (Column(0, BLOCK), Column(64 * BLOCK, BLOCK)))
    memory, driver = elastic_memory(layout, config, full_blocks=10)
    placed = memory.range.layout
    assert placed.num_blocks == (1 + 15 * 3) * 4, "a range of three slabs for each slab of memory"
    assert driver.capacity_pages * driver.granularity_bytes == layout.num_bytes
    with ElasticBuffer(memory, driver):
        cache = torch.zeros(placed.num_bytes, dtype=torch.int8)
    layers = [
        torch.as_strided(cache, (placed.num_blocks, BLOCK), (BLOCK, 1), column.start_bytes)
        for column in placed.columns
    ]
    memory.apply(MemoryChange(budget_slabs=16, committed=(0, 1, 2, 5), aliased=((4, 1),)))
    for number, layer in enumerate(layers):
        layer[4:8] = number + 1
        layer[20:24] = 5
    assert [int(layer[16:20].min()) for layer in layers] == [1, 2]
    assert [int(layer[16:20].max()) for layer in layers] == [1, 2]
    slab_bytes = 4 * layout.block_bytes
    assert rss_of_pages() - before == 5 * slab_bytes, "a page counts at each address"
    memory.apply(MemoryChange(budget_slabs=16, released=(4, 1, 2, 5), committed=(4,)))
    layers[0][16:20] = 7
    memory.pool.maintain()
    assert rss_of_pages() - before == 2 * slab_bytes
    memory.apply(MemoryChange(budget_slabs=16, released=(0, 4)))
    memory.pool.maintain()
    assert rss_of_pages() == before


def test_a_kernel_that_takes_no_memory_back_is_told_of_and_the_cache_may_be_used() -> None:
    calls = FaultyVmCalls()
    with ZeroOnFirstUse() as made:
        cache = torch.zeros(MIN_BYTES, dtype=torch.int8)
    cache[:] = 1
    calls.drop_fault.set(1)
    with pytest.raises(NotNowError, match=r"KV cache's memory back.*/wake_up"):
        made.drop(calls)
    cache[5] = 7
    assert cache[5] == 7
    made.drop(calls)
    assert not cache[:: MIN_BYTES // 8].any()


@pytest.mark.engine  # imports vLLM, some seconds
@pytest.mark.parametrize("order", ["LBHNC", "BLHNC"])
def test_vllm_s_views_reach_every_block_of_the_ranges(order: str) -> None:
    shims.install()
    from vllm.v1.kv_cache_interface import (
        FullAttentionSpec,
        KVCacheConfig,
        KVCacheGroupSpec,
        KVCacheTensor,
    )
    from vllm.v1.kv_cache_layout import KVCacheLayout
    from vllm.v1.worker.utils import allocate_kv_cache

    num_blocks, names = 12, ["a", "b", "c"]
    spec = FullAttentionSpec(block_size=16, num_kv_heads=2, head_size=64, dtype=torch.float32)
    page = spec.page_size_bytes
    strides = (num_blocks * page, page) if order == "LBHNC" else (page, len(names) * page)
    tensor = KVCacheTensor(len(names) * num_blocks * page, names, *strides)
    layout = KVLayout.of_tensors(num_blocks, [tensor])
    config = XTensorConfig(enabled=True, form="contiguous", slab_blocks=2)
    memory, driver = elastic_memory(layout, config, full_blocks=5)
    placed = memory.range.layout
    with ElasticBuffer(memory, driver):
        views = allocate_kv_cache(
            KVCacheConfig(
                placed.num_blocks,
                list(moved([tensor], layout, placed)),
                [KVCacheGroupSpec(names, spec)],
            ),
            torch.device("cpu"),
            KVCacheLayout[order],
        )
    last = memory.range.num_slabs - 1
    memory.apply(MemoryChange(budget_slabs=6, committed=(0, 4, last), aliased=((5, 4),)))
    written = [0, 1, 8, 9, placed.num_blocks - 2, placed.num_blocks - 1]
    for number, name in enumerate(names):
        for block in written:
            views[name][block] = 100.0 * number + block
    for number, name in enumerate(names):
        for block in written:
            assert bool((views[name][block] == 100.0 * number + block).all())
        for block, source in ((10, 8), (11, 9)):
            assert torch.equal(views[name][block], views[name][source])
