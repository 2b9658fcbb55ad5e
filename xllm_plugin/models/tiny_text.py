"""Tiny random language models, one for each architecture the engine treats differently.

Shapes are the smallest that vLLM's CPU kernels take: heads of 64, latent attention of 512+64,
experts a multiple of 32 wide.  All use SmolLM2's tokenizer.
"""

from __future__ import annotations

from typing import Any

import torch
from safetensors.torch import load_file

from xllm_plugin.models.libraries import load_transformers
from xllm_plugin.models.prepare import BuildContext
from xllm_plugin.models.random_model import (
    TOKEN_IDS,
    VOCABULARY_SIZE,
    copy_tokenizer,
    draw,
    save,
    save_tensors,
    seed_weights,
)

__all__ = ["build_deepseek_v2", "build_deepseek_v3", "build_llama", "build_qwen3_moe"]

COMMON: dict[str, Any] = TOKEN_IDS | {
    "vocab_size": VOCABULARY_SIZE,
    "hidden_size": 128,
    "intermediate_size": 256,
    "num_attention_heads": 4,
    "max_position_embeddings": 2048,
    "tie_word_embeddings": False,
}

MULTI_HEAD_LATENT_ATTENTION: dict[str, Any] = {
    "num_key_value_heads": 4,
    "kv_lora_rank": 512,
    "qk_rope_head_dim": 64,
    "qk_nope_head_dim": 64,
    "v_head_dim": 64,
}

DEEPSEEK_EXPERTS: dict[str, Any] = {
    "moe_intermediate_size": 64,
    "n_routed_experts": 8,
    "n_shared_experts": 1,
    "num_experts_per_tok": 2,
    "first_k_dense_replace": 1,
}


def _finish(context: BuildContext, model: Any, config: dict[str, Any] | None = None) -> None:
    save(seed_weights(model), context.folder, config)
    copy_tokenizer(context.models["smollm2"], context.folder)


def build_llama(context: BuildContext) -> None:
    """Dense Llama with grouped-query attention."""
    tf = load_transformers()
    config = tf.LlamaConfig(
        **COMMON, num_hidden_layers=4, num_key_value_heads=2, head_dim=64, rope_theta=1e5
    )
    _finish(context, tf.LlamaForCausalLM(config))


def build_qwen3_moe(context: BuildContext) -> None:
    """Qwen3 MoE: every layer has 8 experts, of which a token takes 2."""
    tf = load_transformers()
    config = tf.Qwen3MoeConfig(
        **COMMON,
        num_hidden_layers=4,
        num_key_value_heads=2,
        head_dim=64,
        num_experts=8,
        num_experts_per_tok=2,
        moe_intermediate_size=64,
        norm_topk_prob=True,
        decoder_sparse_step=1,
        mlp_only_layers=[],
        rope_theta=1e6,
    )
    _finish(context, tf.Qwen3MoeForCausalLM(config))


def build_deepseek_v2(context: BuildContext) -> None:
    """DeepSeek-V2: latent attention, softmax-routed experts, the first layer dense."""
    tf = load_transformers()
    config = tf.DeepseekV2Config(
        **COMMON,
        **MULTI_HEAD_LATENT_ATTENTION,
        **DEEPSEEK_EXPERTS,
        num_hidden_layers=3,
        q_lora_rank=None,
        topk_method="greedy",
        n_group=1,
        topk_group=1,
        norm_topk_prob=False,
        routed_scaling_factor=1.0,
        rope_theta=1e4,
    )
    extra = {"scoring_func": "softmax", "moe_layer_freq": 1}
    _finish(context, tf.DeepseekV2ForCausalLM(config), extra)


def build_deepseek_v3(context: BuildContext) -> None:
    """DeepSeek-V3: low-rank queries, sigmoid-routed grouped experts, one layer that drafts.

    transformers has no multi-token-prediction layer.  It is stored after the last one under that
    layer's number: a decoder layer, here made by asking for one more, and five tensors around it.
    """
    tf = load_transformers()
    num_layers = 3
    config = tf.DeepseekV3Config(
        **COMMON,
        **MULTI_HEAD_LATENT_ATTENTION,
        **DEEPSEEK_EXPERTS,
        num_hidden_layers=num_layers + 1,
        q_lora_rank=96,
        n_group=2,
        topk_group=1,
        norm_topk_prob=True,
        routed_scaling_factor=2.5,
        rope_theta=1e4,
    )
    extra = {
        "num_hidden_layers": num_layers,
        "num_nextn_predict_layers": 1,
        "scoring_func": "sigmoid",
        "topk_method": "noaux_tc",
        "moe_layer_freq": 1,
    }
    _finish(context, tf.DeepseekV3ForCausalLM(config), extra)
    _add_draft_tensors(context, f"model.layers.{num_layers}.")


def _add_draft_tensors(context: BuildContext, prefix: str) -> None:
    """Add what joins token and hidden state, and the copies of embedding and head."""
    path = context.folder / "model.safetensors"
    tensors = load_file(path)
    hidden_size = COMMON["hidden_size"]
    for norm in ("enorm", "hnorm", "shared_head.norm"):
        tensors[f"{prefix}{norm}.weight"] = torch.ones(hidden_size, dtype=torch.bfloat16)
    joined = draw(f"{prefix}eh_proj", (hidden_size, 2 * hidden_size), (2 * hidden_size) ** -0.5)
    tensors[f"{prefix}eh_proj.weight"] = joined.bfloat16()
    tensors[f"{prefix}embed_tokens.weight"] = tensors["model.embed_tokens.weight"].clone()
    tensors[f"{prefix}shared_head.head.weight"] = tensors["lm_head.weight"].clone()
    save_tensors(tensors, path)
