"""What transformers answers in float32 on the host: how far an engine's bfloat16 is from it.

As a command (``python -m xllm_plugin.testing.float32 --model DIR --prompts FILE --out FILE``) it
answers chat prompts greedily, one after the other, and writes completions with log-probs as JSON,
as `xllm_plugin.testing.collect` does with an engine.  Its own process, because importing
transformers beside PyPI's media libraries needs our shims first.
"""

from __future__ import annotations

import json
import math
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click

from xllm_plugin import shims
from xllm_plugin.bench.files import write_atomically
from xllm_plugin.errors import ModelError
from xllm_plugin.testing.collect import Prompt, read_prompts
from xllm_plugin.testing.equality import Completion, read_completions

__all__ = ["InFloat32", "answers_in_float32", "without_expert_ties"]

ROUTER = "mlp.gate"
"""The end of a router's name in transformers' models."""


@dataclass(frozen=True, slots=True)
class InFloat32:
    """What transformers answered.

    Attributes:
        completions: one a prompt.
        expert_ties: of each prompt, the positions for which some router's last expert chosen and
            first one not chosen are so near that bfloat16 may choose the other.
    """

    completions: tuple[Completion, ...]
    expert_ties: Mapping[str, frozenset[int]]


def without_expert_ties(
    reference: InFloat32, answers: Sequence[Completion]
) -> tuple[list[Completion], list[Completion], int]:
    """Both sides, a sequence that first differs where experts tie being cut before that place.

    Returns:
        The reference, the answers, and how many sequences were cut.
    """
    kept: tuple[list[Completion], list[Completion]] = ([], [])
    num_cut = 0
    by_prompt = {one.prompt_id: one for one in answers}
    for expected in reference.completions:
        found = by_prompt[expected.prompt_id]
        pairs = enumerate(zip(expected.token_ids, found.token_ids, strict=False))
        differing = next((at for at, (a, b) in pairs if a != b), None)
        is_tie = differing in reference.expert_ties.get(expected.prompt_id, ())
        num_cut += is_tie
        end = differing if is_tie else None
        if end != 0:
            kept[0].append(cut(expected, end))
            kept[1].append(cut(found, end))
    return *kept, num_cut


def cut(completion: Completion, end: int | None) -> Completion:
    """Its first `end` tokens; all without one."""
    return Completion(
        completion.prompt_id,
        completion.token_ids[:end],
        completion.logprobs[:end],
        completion.candidates[:end],
    )


def answers_in_float32(
    model: Path, prompts: Path, *, limit: int, max_tokens: int, num_candidates: int
) -> InFloat32:
    """Greedy answers to the first `limit` prompts, at most `max_tokens` each.

    Raises:
        ModelError: transformers failed; the message ends with its last words.
    """
    with tempfile.TemporaryDirectory(prefix="xllm-float32-") as folder:
        out = Path(folder, "out.json")
        options = {
            "model": model,
            "prompts": prompts,
            "out": out,
            "limit": limit,
            "max-tokens": max_tokens,
            "num-candidates": num_candidates,
        }
        command = [sys.executable, "-m", __name__]
        command += [f"--{name}={value}" for name, value in options.items()]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            raise ModelError(f"{model} in float32 failed: {done.stderr[-2000:]}")
        ties = json.loads(out.read_text())["expert_ties"]
        return InFloat32(
            read_completions(out), {prompt: frozenset(at) for prompt, at in ties.items()}
        )


def answer_all(
    model_folder: str, prompts: Sequence[Prompt], max_tokens: int, num_candidates: int
) -> InFloat32:
    """Answer in this process."""
    import torch
    import transformers

    model = transformers.AutoModelForCausalLM.from_pretrained(model_folder, dtype=torch.float32)
    tokenizer = transformers.AutoTokenizer.from_pretrained(model_folder)
    ends = model.generation_config.eos_token_id
    is_end = set(ends if isinstance(ends, list) else [ends]).__contains__
    are_experts_tied = watch_routers(model)
    ties: dict[str, frozenset[int]] = {}

    def answer(prompt: Prompt) -> Completion:
        text = tokenizer.apply_chat_template(
            prompt.messages(), add_generation_prompt=True, tokenize=False
        )
        new, past = tokenizer.encode(text, add_special_tokens=False), None
        tokens: list[int] = []
        candidates: list[dict[int, float]] = []
        tied: set[int] = set()
        while len(tokens) < max_tokens and not (tokens and is_end(tokens[-1])):
            output = model(torch.tensor([new]), past_key_values=past, use_cache=True)
            past = output.past_key_values
            if are_experts_tied():
                tied.add(len(tokens))
            best = output.logits[0, -1].log_softmax(-1).topk(num_candidates)
            candidates.append(dict(zip(best.indices.tolist(), best.values.tolist(), strict=True)))
            new = [int(best.indices[0])]
            tokens += new
        ties[prompt.prompt_id] = frozenset(tied)
        scores = tuple(at[token] for token, at in zip(tokens, candidates, strict=True))
        return Completion(prompt.prompt_id, tuple(tokens), scores, tuple(candidates))

    with torch.inference_mode():
        return InFloat32(tuple(map(answer, prompts)), ties)


def watch_routers(model: Any) -> Callable[[], bool]:
    """Tells, after each call of a model, whether experts tied for its last token in some layer.

    They do where the two logits are less than two steps of bfloat16 apart: each may be off by one.
    Only routers that choose by their logits alone are watched, so none of DeepSeek's.
    """
    num_chosen = getattr(model.config, "num_experts_per_tok", None)
    if num_chosen is None or getattr(model.config, "n_group", None) is not None:
        return lambda: False
    seen: dict[str, bool] = {}

    def watch(name: str, router: Any) -> None:
        def look(_: Any, inputs: tuple[Any, ...], __: Any) -> None:
            logits = inputs[0].reshape(-1, inputs[0].shape[-1])[-1] @ router.weight.t()
            *_, last, first_not = logits.topk(num_chosen + 1).values.tolist()
            step = 2.0 ** (math.frexp(max(abs(last), abs(first_not)))[1] - 8)
            seen[name] = last - first_not < 2 * step

        router.register_forward_hook(look)

    for name, module in model.named_modules():
        if name.endswith(ROUTER):
            watch(name, module)
    return lambda: any(seen.values())


@click.command()
@click.option("--model", required=True, help="Folder of the model.")
@click.option("--prompts", required=True, type=click.Path(exists=True, path_type=Path))
@click.option("--out", required=True, type=click.Path(path_type=Path), help="JSON file to write.")
@click.option("--limit", type=int, help="Use only the first prompts.")
@click.option("--max-tokens", default=32, show_default=True)
@click.option("--num-candidates", default=5, show_default=True)
def main(*, model: str, prompts: Path, out: Path, limit: int | None, **counts: int) -> None:
    """Answer PROMPTS greedily with transformers in float32."""
    shims.install()
    asked = read_prompts(prompts)[:limit]
    found = answer_all(model, asked, counts["max_tokens"], counts["num_candidates"])
    record = {
        "completions": [one.to_dict() for one in found.completions],
        "expert_ties": {prompt: sorted(at) for prompt, at in found.expert_ties.items()},
    }
    write_atomically(out, json.dumps(record))


if __name__ == "__main__":
    main()
