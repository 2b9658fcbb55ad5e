"""Mixture of experts: choose, sort by expert, two grouped products, and back to the tokens' order.

vLLM's router stays out of it: on a device out of tree it would call kernels that CUDA alone has.
An experts' method that is monolithic gets the router's logits and does the choosing as well
(seam "npu-experts").
"""

from __future__ import annotations

from typing import Any

import torch
import torch_npu
from vllm.model_executor.layers.fused_moe.activation import MoEActivation
from vllm.model_executor.layers.fused_moe.unquantized_fused_moe_method import (
    UnquantizedFusedMoEMethod,
)

from xllm_plugin.errors import PlatformError

__all__ = ["NpuExperts"]

SOFTMAX, SIGMOID = 0, 1
"""Of npu_moe_gating_top_k: what makes scores of logits."""

LARGEST, SUM_OF_TWO = 0, 1
"""Of npu_moe_gating_top_k: what makes a group's score of its experts'."""


@UnquantizedFusedMoEMethod.register_oot(name="UnquantizedFusedMoEMethod")
class NpuExperts(UnquantizedFusedMoEMethod):
    """The experts of one layer, all of them on this device, in the model's own type."""

    @property
    def is_monolithic(self) -> bool:
        """True: it is given logits, not chosen experts."""
        return True

    def create_weights(self, layer: Any, *args: Any, **kwargs: Any) -> None:
        """See vLLM's method; here a layer that cannot be run is refused before it is loaded.

        Raises:
            PlatformError: the layer does what these operators are not called for.
        """
        reason = refusal(layer)
        if reason is not None:
            raise PlatformError(
                f"experts on the NPU family do not do {reason}; they do SwiGLU without biases, "
                "chosen by softmax or by normalised sigmoid. See docs/npu.md."
            )
        super().create_weights(layer, *args, **kwargs)

    def apply_monolithic(
        self,
        layer: Any,
        x: torch.Tensor,
        router_logits: torch.Tensor,
        input_ids: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Each token's weighed sum over its experts.

        Args:
            layer: with `w13_weight` [experts, 2 * width, hidden], gate before up, and `w2_weight`
                [experts, hidden, width].
            x: [tokens, hidden].
            router_logits: [tokens, experts].
            input_ids: not needed.

        Returns:
            [tokens, hidden].
        """
        del input_ids
        weights, experts = choose_experts(layer, router_logits)
        num_experts = layer.global_num_experts
        rows, places, counts, _ = torch_npu.npu_moe_init_routing_v2(
            x,
            experts,
            active_num=experts.numel(),
            expert_num=num_experts,
            expert_tokens_num_type=1,  # counts, not running sums
            expert_tokens_num_flag=True,
            active_expert_range=[0, num_experts],
            quant_mode=-1,  # none
            row_idx_type=0,  # of each choice, its place among the rows
        )
        rows = grouped_product(rows, layer.w13_weight, counts)
        rows = grouped_product(torch_npu.npu_swiglu(rows, dim=-1), layer.w2_weight, counts)
        return torch_npu.npu_moe_token_unpermute(rows, places, probs=weights.to(x.dtype))


def refusal(layer: Any) -> str | None:
    """What a layer of experts asks for that is not done here, or None."""
    asked = {
        "a routing function of the model": layer.custom_routing_function is not None,
        f"scores by {layer.scoring_func}": layer.scoring_func not in {"softmax", "sigmoid"},
        "sigmoid scores that are not normalised": layer.scoring_func == "sigmoid"
        and not layer.renormalize,
        f"activation {layer.activation.value}": layer.activation != MoEActivation.SILU,
        "a limit on SwiGLU": layer.swiglu_limit is not None,
        "biases": layer.moe_config.has_bias,
        "weights on the input": layer.apply_router_weight_on_input,
    }
    return next((what for what, is_asked in asked.items() if is_asked), None)


def choose_experts(layer: Any, logits: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The experts of each token and their weights.

    Returns:
        Weights [tokens, k] in float32 and experts [tokens, k] in int32.
    """
    is_sigmoid, bias = layer.scoring_func == "sigmoid", layer.e_score_correction_bias
    is_grouped = layer.use_grouped_topk
    weights, experts, _ = torch_npu.npu_moe_gating_top_k(
        logits.float(),
        k=layer.top_k,
        bias=None if bias is None else bias.float(),
        k_group=layer.topk_group if is_grouped else 1,
        group_count=layer.num_expert_group if is_grouped else 1,
        group_select_mode=LARGEST if bias is None else SUM_OF_TWO,
        renorm=0,
        norm_type=SIGMOID if is_sigmoid else SOFTMAX,
        routed_scaling_factor=1.0,
    )
    # The operator normalises weights made by sigmoid, and no others.
    if layer.renormalize and not is_sigmoid:
        weights /= weights.sum(-1, keepdim=True)
    return weights * layer.routed_scaling_factor, experts


def grouped_product(rows: torch.Tensor, weight: torch.Tensor, counts: torch.Tensor) -> torch.Tensor:
    """Rows, sorted by expert, times their expert's weight.

    Args:
        rows: [rows, in].
        weight: [experts, out, in], read transposed, as it lies.
        counts: [experts] int64, the rows of each.

    Returns:
        [rows, out].
    """
    (product,) = torch_npu.npu_grouped_matmul(
        [rows],
        [weight.transpose(1, 2)],
        group_list=counts,
        split_item=2,  # one tensor
        group_type=0,  # groups of rows
        group_list_type=1,  # counts
    )
    return product
