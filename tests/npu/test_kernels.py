"""vLLM's Triton kernels in torch, against a loop."""

from __future__ import annotations

import inspect

import pytest
import torch

from xllm_plugin.npu.kernels import KERNELS, compute_slot_mapping


@pytest.mark.parametrize("lengths", [[1], [3, 1, 4], [0, 2, 0, 5]])
def test_every_token_gets_its_slot_and_padding_gets_none(lengths: list[int]) -> None:
    block, generator = 4, torch.Generator().manual_seed(0)
    table = torch.randint(0, 99, (len(lengths) + 2, 8), generator=generator, dtype=torch.int32)
    starts = torch.tensor([0, *torch.tensor(lengths).cumsum(0).tolist()], dtype=torch.int32)
    first = [7 * i % 11 for i in range(len(lengths))]
    positions = [at + i for at, n in zip(first, lengths, strict=True) for i in range(n)]
    slots = torch.full((16,), 77)
    compute_slot_mapping(
        num_tokens=len(positions),
        max_num_tokens=16,
        query_start_loc_ptr=starts,
        positions_ptr=torch.tensor([*positions, 5, 5]),
        block_table_ptr=table,
        block_table_stride=table.stride(0),
        slot_mapping_ptr=slots,
        KV_CACHE_BLOCK_SIZE=block,
        TOTAL_CP_WORLD_SIZE=1,
        TOTAL_CP_RANK=0,
        CP_KV_CACHE_INTERLEAVE_SIZE=1,
        PAD_ID=-1,
        BLOCK_SIZE=1024,
    )
    owners = [request for request, n in enumerate(lengths) for _ in range(n)]
    expected = [
        int(table[request, position // block]) * block + position % block
        for request, position in zip(owners, positions, strict=True)
    ]
    assert slots.tolist() == expected + [-1] * (16 - len(expected))


def test_replacements_have_the_parameters_of_vllms_kernels() -> None:
    """With others vLLM would call them by position."""
    from vllm.triton_utils.dispatcher import _kernel_arg_names, _resolve_kernel

    for name, function in KERNELS.items():
        host, attribute = _resolve_kernel(name)
        ours = tuple(inspect.signature(function).parameters)
        assert ours == _kernel_arg_names(getattr(host, attribute))
