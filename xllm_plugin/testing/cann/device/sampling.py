"""The operator that filters logits before sampling, in plain torch; see `dense`."""

from __future__ import annotations

import torch

from xllm_plugin.testing.cann.device.contract import FLOATS, emulates, require, require_dtype

__all__: list[str] = []

MAX_K = 1024


@emulates("npu_top_k_top_p")
def top_k_top_p(
    logits: torch.Tensor, p: torch.Tensor | None = None, k: torch.Tensor | None = None
) -> torch.Tensor:
    """Logits [B, V], those below the k-th largest and then outside the nucleus of p being -inf.

    Of equal logits the later ones are likelier, as in a stable sort upwards; one always stays.
    """
    require_dtype("logits", logits, FLOATS)
    require(logits.dim() == 2, f"logits have {logits.dim()} dimensions, not 2")
    require(p is not None or k is not None, "neither p nor k is given")
    values, indices = logits.sort(dim=-1, stable=True)
    if k is not None:
        _check_rows("k", k, logits)
        require_dtype("k", k, (torch.int32,))
        most = min(MAX_K, logits.shape[1])
        require(bool(((k >= 1) & (k <= most)).all()), f"k is outside 1 to {most}")
        least = values.gather(1, (logits.shape[1] - k.long()).unsqueeze(1))
        values = values.masked_fill(values < least, -torch.inf)
    if p is not None:
        _check_rows("p", p, logits)
        require_dtype("p", p, (logits.dtype,))
        require(bool(((p >= 0) & (p <= 1)).all()), "p is outside 0 to 1")
        outside = values.float().softmax(-1).cumsum(-1) <= 1 - p.float().unsqueeze(1)
        outside[:, -1] = False
        values = values.masked_fill(outside, -torch.inf)
    return torch.empty_like(logits).scatter_(1, indices, values)


def _check_rows(name: str, tensor: torch.Tensor, logits: torch.Tensor) -> None:
    expected = (logits.shape[0],)
    require(tuple(tensor.shape) == expected, f"{name} is {tuple(tensor.shape)}, not {expected}")
