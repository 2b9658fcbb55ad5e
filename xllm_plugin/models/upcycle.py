"""SmolLM2 as a mixture of experts: real text from a Mixtral-format model.

Every MLP is copied to 4 experts and a random router chooses 2.  With equal experts the router's
weights sum to one over the same function, so the output equals the dense model's whatever is
routed where: an oracle for expert placement and parallelism.  With noisy experts a token that
reaches a wrong expert changes the output, while the text stays sensible.
"""

from __future__ import annotations

import json
import shutil

import torch
from safetensors.torch import load_file

from xllm_plugin.models.prepare import BuildContext
from xllm_plugin.models.random_model import copy_tokenizer, draw, save_tensors

__all__ = ["build_equal_experts", "build_noisy_experts"]

NUM_EXPERTS = 4
EXPERTS_PER_TOKEN = 2
ROUTER_STD = 0.1

# Relative to a matrix's own standard deviation: text stays sensible, logits differ.
NOISE = 0.02

EXPERT_NAMES = {"gate_proj": "w1", "down_proj": "w2", "up_proj": "w3"}


def build_equal_experts(context: BuildContext) -> None:
    """Four copies of each MLP."""
    _build(context, noise=0.0)


def build_noisy_experts(context: BuildContext) -> None:
    """Four different experts near each MLP."""
    _build(context, noise=NOISE)


def _build(context: BuildContext, noise: float) -> None:
    source = context.models["smollm2"]
    config = json.loads((source / "config.json").read_text("utf-8"))
    tensors: dict[str, torch.Tensor] = {}
    dense = load_file(source / "model.safetensors")
    with context.reporter.bar("copying experts", len(dense)) as advance:
        for name, tensor in dense.items():
            tensors |= _experts(name, tensor, noise) if ".mlp." in name else {name: tensor}
            advance(1)
    router_shape = (NUM_EXPERTS, config["hidden_size"])
    for layer in range(config["num_hidden_layers"]):
        name = f"model.layers.{layer}.block_sparse_moe.gate.weight"
        tensors[name] = draw(name, router_shape, ROUTER_STD).bfloat16()
    save_tensors(tensors, context.folder / "model.safetensors")
    config |= {
        "architectures": ["MixtralForCausalLM"],
        "model_type": "mixtral",
        "num_local_experts": NUM_EXPERTS,
        "num_experts_per_tok": EXPERTS_PER_TOKEN,
        "sliding_window": None,
        "router_aux_loss_coef": 0.0,
        "output_router_logits": False,
    }
    (context.folder / "config.json").write_text(json.dumps(config, indent=1) + "\n", "utf-8")
    copy_tokenizer(source, context.folder)
    shutil.copyfile(source / "generation_config.json", context.folder / "generation_config.json")


def _experts(name: str, dense: torch.Tensor, noise: float) -> dict[str, torch.Tensor]:
    """Return the experts' tensors made from one tensor of a dense MLP."""
    layer, part = name.split(".")[2], EXPERT_NAMES[name.split(".")[4]]
    experts = {}
    for expert in range(NUM_EXPERTS):
        expert_name = f"model.layers.{layer}.block_sparse_moe.experts.{expert}.{part}.weight"
        values = dense.float()
        if noise:
            values = values + draw(expert_name, tuple(dense.shape), noise * float(values.std()))
        experts[expert_name] = values.to(dense.dtype, copy=True)
    return experts
