"""Tiny vision-language models: random towers, processors written by their own classes.

Two families are covered: LLaVA (one image, a fixed number of tokens) and Qwen-VL (any size, video,
multimodal rotary positions; the third version adds deepstack).  `smollm2-llava` puts a random tower
on SmolLM2, so that text prompts get sensible text.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from xllm_plugin.models.libraries import load_transformers
from xllm_plugin.models.prepare import BuildContext
from xllm_plugin.models.random_model import (
    TOKEN_IDS,
    VOCABULARY_SIZE,
    copy_tokenizer,
    save,
    save_tensors,
    seed_weights,
)

__all__ = ["build_llava", "build_qwen2_5_vl", "build_qwen3_vl", "build_smollm2_llava"]

# Room for the image tokens, and a multiple of 32 for the kernels.
PADDED_VOCABULARY_SIZE = VOCABULARY_SIZE + 32

IMAGE_TOKEN = "<image>"  # noqa: S105  no password
VISION_TOKENS = {
    "vision_start_token_id": "<|vision_start|>",
    "vision_end_token_id": "<|vision_end|>",
    "image_token_id": "<|image_pad|>",
    "video_token_id": "<|video_pad|>",
}

TINY_TEXT: dict[str, Any] = TOKEN_IDS | {
    "vocab_size": PADDED_VOCABULARY_SIZE,
    "hidden_size": 128,
    "intermediate_size": 256,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "max_position_embeddings": 4096,
    "tie_word_embeddings": False,
}

TINY_TOWER: dict[str, Any] = {"hidden_size": 128, "intermediate_size": 256}

IMAGE_SIDE_PX = 112
PATCH_SIDE_PX = 14


def _chat_template(image: str, video: str | None) -> str:
    """Return a ChatML template whose content may be text or a list of parts."""
    video_part = ""
    if video is not None:
        video_part = "{% elif part['type'] == 'video' %}" + video
    return (
        "{% for message in messages %}"
        "{{ '<|im_start|>' + message['role'] + '\n' }}"
        "{% if message['content'] is string %}{{ message['content'] }}"
        "{% else %}{% for part in message['content'] %}"
        "{% if part['type'] in ['image', 'image_url'] %}"
        + image
        + video_part
        + "{% elif 'text' in part %}{{ part['text'] }}"
        "{% endif %}{% endfor %}{% endif %}"
        "{{ '<|im_end|>\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
    )


def _tokenizer(context: BuildContext, added: list[str], chat_template: str) -> Any:
    """Return SmolLM2's tokenizer with `added` special tokens, numbered from its end on."""
    tf = load_transformers()
    copy_tokenizer(context.models["smollm2"], context.folder)
    tokenizer = tf.PreTrainedTokenizerFast.from_pretrained(context.folder)
    tokens = [tf.AddedToken(token, special=True, normalized=False) for token in added]
    tokenizer.add_tokens(tokens, special_tokens=True)
    first = VOCABULARY_SIZE
    assert tokenizer.convert_tokens_to_ids(added) == list(range(first, first + len(added)))
    tokenizer.chat_template = chat_template
    return tokenizer


# --- LLaVA ---------------------------------------------------------------------------------------


def build_llava(context: BuildContext) -> None:
    """LLaVA on a random two-layer Llama."""
    text = TINY_TEXT | {"model_type": "llama", "head_dim": 64}
    model = seed_weights(_llava(text, tie_word_embeddings=False))
    _finish_llava(context, model)


def build_smollm2_llava(context: BuildContext) -> None:
    """LLaVA on SmolLM2: text is real, images are noise that changes the answer."""
    tf = load_transformers()
    source = context.models["smollm2"]
    text = tf.AutoConfig.from_pretrained(source).to_dict()
    model = seed_weights(
        _llava(text | {"vocab_size": PADDED_VOCABULARY_SIZE}, tie_word_embeddings=True)
    )
    _put_text_model(model, source)
    _finish_llava(context, model)


def _llava(text_config: dict[str, Any], *, tie_word_embeddings: bool) -> Any:
    tf = load_transformers()
    tower = TINY_TOWER | {
        "model_type": "clip_vision_model",
        "num_hidden_layers": 3,
        "num_attention_heads": 2,
        "image_size": IMAGE_SIDE_PX,
        "patch_size": PATCH_SIDE_PX,
        "projection_dim": 64,
    }
    config = tf.LlavaConfig(
        text_config=text_config,
        vision_config=tower,
        image_token_index=VOCABULARY_SIZE,
        vision_feature_layer=-2,
        vision_feature_select_strategy="default",
        projector_hidden_act="gelu",
        image_seq_length=(IMAGE_SIDE_PX // PATCH_SIDE_PX) ** 2,
        tie_word_embeddings=tie_word_embeddings,
    )
    return tf.LlavaForConditionalGeneration(config)


@torch.no_grad()  # type: ignore[untyped-decorator]  # torch is not checked
def _put_text_model(llava: Any, source: Path) -> None:
    """Replace the language model by the one in `source`, its vocabulary padded."""
    tf = load_transformers()
    text = tf.AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32)
    text.resize_token_embeddings(PADDED_VOCABULARY_SIZE, mean_resizing=False)
    # Rows for tokens that do not exist: transformers draws them from the global generator.
    embedding = text.get_input_embeddings().weight
    embedding[VOCABULARY_SIZE:] = 0.0
    llava.model.language_model.load_state_dict(text.model.state_dict(), strict=True)
    llava.lm_head.weight = llava.model.language_model.embed_tokens.weight
    # Image embeddings a few times as large as words', or the random picture would not be noticed.
    scale = 6 * embedding[:VOCABULARY_SIZE].std()
    llava.model.multi_modal_projector.linear_2.weight.mul_(scale)


def _finish_llava(context: BuildContext, model: Any) -> None:
    tf = load_transformers()
    save(model, context.folder)
    _rename_tower(context.folder / "model.safetensors")
    template = _chat_template(f"{IMAGE_TOKEN}\n", video=None)
    image_processor = getattr(tf, "CLIPImageProcessorPil", tf.CLIPImageProcessor)
    tf.LlavaProcessor(
        image_processor=image_processor(
            size={"shortest_edge": IMAGE_SIDE_PX},
            crop_size={"height": IMAGE_SIDE_PX, "width": IMAGE_SIDE_PX},
        ),
        tokenizer=_tokenizer(context, [IMAGE_TOKEN], template),
        patch_size=PATCH_SIDE_PX,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=template,
    ).save_pretrained(context.folder)


def _rename_tower(path: Path) -> None:
    """Name the tower's tensors as published checkpoints do.

    transformers 5 leaves out `vision_model.` when it saves and reads both; vLLM wants it.
    """
    tower, published = "vision_tower.", "vision_tower.vision_model."
    tensors = {
        name if published in name else name.replace(tower, published): tensor
        for name, tensor in load_file(path).items()
    }
    save_tensors(tensors, path)


# --- Qwen-VL -------------------------------------------------------------------------------------


def _qwen_tokenizer(context: BuildContext) -> Any:
    def wrapped(token: str) -> str:
        return f"<|vision_start|>{token}<|vision_end|>"

    template = _chat_template(wrapped("<|image_pad|>"), wrapped("<|video_pad|>"))
    return _tokenizer(context, list(VISION_TOKENS.values()), template)


def _qwen_token_ids() -> dict[str, int]:
    return {key: VOCABULARY_SIZE + index for index, key in enumerate(VISION_TOKENS)}


def _rope(theta: float, sections: list[int], **extra: Any) -> dict[str, Any]:
    """Return rotary parameters; `sections` share a head's 32 pairs: time, height, width."""
    return {"rope_type": "default", "rope_theta": theta, "mrope_section": sections} | extra


def build_qwen2_5_vl(context: BuildContext) -> None:
    """Qwen2.5-VL: windowed attention in the tower, the last of its two layers full."""
    tf = load_transformers()
    tower = TINY_TOWER | {
        "depth": 2,
        "num_heads": 2,
        "out_hidden_size": TINY_TEXT["hidden_size"],
        "patch_size": 14,
        "spatial_merge_size": 2,
        "temporal_patch_size": 2,
        "window_size": 56,
        "fullatt_block_indexes": [1],
        "hidden_act": "silu",
    }
    config = tf.Qwen2_5_VLConfig(
        text_config=TINY_TEXT | {"rope_parameters": _rope(1e6, [8, 12, 12])},
        vision_config=tower,
        tie_word_embeddings=False,
        **_qwen_token_ids(),
    )
    save(seed_weights(tf.Qwen2_5_VLForConditionalGeneration(config)), context.folder)
    tokenizer = _qwen_tokenizer(context)
    pixels = {"min_pixels": 56 * 56, "max_pixels": 224 * 224}
    tf.Qwen2_5_VLProcessor(
        image_processor=tf.Qwen2VLImageProcessor(**pixels),
        tokenizer=tokenizer,
        video_processor=tf.Qwen2VLVideoProcessor(**pixels),
        chat_template=tokenizer.chat_template,
    ).save_pretrained(context.folder)


def build_qwen3_vl(context: BuildContext) -> None:
    """Qwen3-VL: the tower's first two layers are also fed to the text model (deepstack)."""
    tf = load_transformers()
    tower = TINY_TOWER | {
        "depth": 3,
        "num_heads": 2,
        "out_hidden_size": TINY_TEXT["hidden_size"],
        "patch_size": 16,
        "spatial_merge_size": 2,
        "temporal_patch_size": 2,
        "num_position_embeddings": 64,
        "deepstack_visual_indexes": [0, 1],
        "hidden_act": "gelu_pytorch_tanh",
    }
    rope = _rope(5e6, [12, 10, 10], mrope_interleaved=True)
    config = tf.Qwen3VLConfig(
        text_config=TINY_TEXT | {"head_dim": 64, "rope_parameters": rope},
        vision_config=tower,
        tie_word_embeddings=False,
        **_qwen_token_ids(),
    )
    save(seed_weights(tf.Qwen3VLForConditionalGeneration(config)), context.folder)
    tokenizer = _qwen_tokenizer(context)
    images = {
        "patch_size": 16,
        "temporal_patch_size": 2,
        "merge_size": 2,
        "size": {"shortest_edge": 64 * 64, "longest_edge": 256 * 256},
        "image_mean": [0.5] * 3,
        "image_std": [0.5] * 3,
    }
    tf.Qwen3VLProcessor(
        image_processor=tf.Qwen2VLImageProcessor(**images),
        tokenizer=tokenizer,
        video_processor=tf.Qwen3VLVideoProcessor(**images),
        chat_template=tokenizer.chat_template,
    ).save_pretrained(context.folder)
