"""What transformers answers in float32 on the host: how far an engine's bfloat16 is from it.

As a command (``python -m xllm_plugin.testing.float32 --model DIR --prompts FILE --out FILE``) it
answers chat prompts greedily, one after the other, and writes completions with log-probs as JSON,
as `xllm_plugin.testing.collect` does with an engine.  Its own process, because importing
transformers beside PyPI's media libraries needs our shims first.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

import click

from xllm_plugin import shims
from xllm_plugin.bench.files import write_atomically
from xllm_plugin.errors import ModelError
from xllm_plugin.testing.collect import Prompt, read_prompts
from xllm_plugin.testing.equality import Completion, read_completions

__all__ = ["answers_in_float32"]


def answers_in_float32(
    model: Path, prompts: Path, *, limit: int, max_tokens: int, num_candidates: int
) -> tuple[Completion, ...]:
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
        return read_completions(out)


def answer_all(
    model_folder: str, prompts: Sequence[Prompt], max_tokens: int, num_candidates: int
) -> list[Completion]:
    """Answer in this process."""
    import torch
    import transformers

    model = transformers.AutoModelForCausalLM.from_pretrained(model_folder, dtype=torch.float32)
    tokenizer = transformers.AutoTokenizer.from_pretrained(model_folder)
    ends = model.generation_config.eos_token_id
    is_end = set(ends if isinstance(ends, list) else [ends]).__contains__

    def answer(prompt: Prompt) -> Completion:
        text = tokenizer.apply_chat_template(
            prompt.messages(), add_generation_prompt=True, tokenize=False
        )
        new, past = tokenizer.encode(text, add_special_tokens=False), None
        tokens: list[int] = []
        candidates: list[dict[int, float]] = []
        while len(tokens) < max_tokens and not (tokens and is_end(tokens[-1])):
            output = model(torch.tensor([new]), past_key_values=past, use_cache=True)
            past = output.past_key_values
            best = output.logits[0, -1].log_softmax(-1).topk(num_candidates)
            candidates.append(dict(zip(best.indices.tolist(), best.values.tolist(), strict=True)))
            new = [int(best.indices[0])]
            tokens += new
        scores = tuple(at[token] for token, at in zip(tokens, candidates, strict=True))
        return Completion(prompt.prompt_id, tuple(tokens), scores, tuple(candidates))

    with torch.inference_mode():
        return [answer(prompt) for prompt in prompts]


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
    write_atomically(out, json.dumps({"completions": [one.to_dict() for one in found]}))


if __name__ == "__main__":
    main()
