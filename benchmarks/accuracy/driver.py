"""One side of the comparison: lm-eval in its own process, so that the platform choice is clean.

``python driver.py JOB.json`` runs lm-eval once per task and pass of the job and writes what it
found to `job["out"]`.  Scores are lm-eval's.  The two model classes below are lm-eval's own with
one addition: they ask for the log-probabilities of the best few tokens as well and keep them, so
that a differing item can be told from a near-tie afterwards (`compare.py`).

A job is made by `sides.py`.  The first pass decides the scores; further passes repeat it, or run it
at another batch size to see how far an engine is from itself.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from xllm_plugin import shims
from xllm_plugin.bench.files import write_atomically

# Both sides need them: lm-eval imports transformers (and so torchvision) before vLLM, and asks for
# the version of the distribution `vllm`.
shims.install()

TASKS = Path(__file__).resolve().parent / "tasks"

NUM_CANDIDATES = 5
"""Best tokens kept per position: a flip is between the first two, rarely the third."""

Position = dict[str, Any]
"""{"token": id of the likeliest (or chosen) token, "candidates": {id: log-probability in nats}}"""


class Recorder:
    """What the engine said about each prompt, by the prompt's tokens (or text)."""

    def __init__(self) -> None:
        self._scored: dict[tuple[object, int], list[Position]] = {}
        self._written: dict[object, list[Position]] = {}

    def scored(self, tokens: Sequence[int], num_context: int, positions: list[Position]) -> None:
        """Keep the positions of a continuation that follows `num_context` tokens."""
        self._scored[tuple(tokens), num_context] = positions

    def written(self, prompt: Sequence[int] | str, positions: list[Position]) -> None:
        """Keep a generated text's positions."""
        self._written[prompt if isinstance(prompt, str) else tuple(prompt)] = positions

    def of_scored(self, context: Sequence[int], continuation: Sequence[int]) -> list[Position]:
        """The inverse of `scored`.  Raises `KeyError` when lm-eval truncated the prompt."""
        return self._scored[(*context, *continuation), len(context)]

    def of_written(self, prompt: Sequence[int] | str) -> list[Position]:
        """The inverse of `written`."""
        return self._written[prompt if isinstance(prompt, str) else tuple(prompt)]


def make_offline_model(arguments: Mapping[str, Any], batch_size: int) -> Any:
    """lm-eval's `vllm` model, recording."""
    from lm_eval.models.vllm_causallms import VLLM
    from vllm import SamplingParams

    class RecordingVllm(VLLM):  # type: ignore[misc]  # lm-eval is untyped
        recorder = Recorder()
        found: list[list[Position]]

        def _model_generate(
            self, requests: Any, generate: bool = False, sampling_params: Any = None
        ) -> Any:
            if not generate:
                ask = SamplingParams(
                    temperature=0, prompt_logprobs=NUM_CANDIDATES, max_tokens=1, detokenize=False
                )
                return super()._model_generate(requests, True, ask)
            for params in sampling_params:
                params.logprobs = NUM_CANDIDATES
            outputs = super()._model_generate(requests, True, sampling_params)
            for prompt, output in zip(requests, outputs, strict=True):
                best = output.outputs[0]
                tokens = zip(best.token_ids, best.logprobs, strict=True)
                positions = [_position(token, _values(probs)) for token, probs in tokens]
                self.recorder.written(prompt, positions)
            return outputs

        def _parse_logprobs(self, tokens: Any, outputs: Any, ctxlen: int) -> Any:
            scored = zip(tokens[ctxlen:], outputs.prompt_logprobs[ctxlen:], strict=True)
            positions = [_scored(_values(probs), token) for token, probs in scored]
            self.recorder.scored(tokens, ctxlen, positions)
            return super()._parse_logprobs(tokens, outputs, ctxlen)

        def _loglikelihood_tokens(self, requests: Any, **kwargs: Any) -> Any:
            results = super()._loglikelihood_tokens(requests, **kwargs)
            self.found = [self.recorder.of_scored(before, after) for _, before, after in requests]
            return results

        def generate_until(self, requests: Any, **kwargs: Any) -> Any:
            results = super().generate_until(requests, **kwargs)
            prompts = self.tok_encode([request.args[0] for request in requests])
            self.found = [self.recorder.of_written(prompt) for prompt in prompts]
            return results

        def begin(self, batch_size: int, salt: str) -> None:
            del salt
            self.batch_size = batch_size
            self.model.reset_prefix_cache()

    return RecordingVllm(batch_size=batch_size, **arguments)


def make_server_model(arguments: Mapping[str, Any], batch_size: int) -> Any:
    """lm-eval's `local-completions` model, recording."""
    from lm_eval.models.openai_completions import LocalCompletionsAPI

    class RecordingCompletions(LocalCompletionsAPI):  # type: ignore[misc]  # as above
        recorder = Recorder()
        found: list[list[Position]]
        salt = ""

        def _create_payload(self, messages: Any, **kwargs: Any) -> dict[str, Any]:
            asked = super()._create_payload(messages, **kwargs)
            extra = {"logprobs": NUM_CANDIDATES, "return_tokens_as_token_ids": True}
            # A salt of its own gives every pass the same, empty, prefix cache.
            return {**asked, **extra, "cache_salt": self.salt}

        def parse_logprobs(
            self, outputs: Any, tokens: Any = None, ctxlens: Any = None, **kwargs: Any
        ) -> Any:
            choices = sorted(outputs[0]["choices"], key=lambda choice: choice["index"])
            for choice, prompt, start in zip(choices, tokens, ctxlens, strict=True):
                # One token is generated behind the prompt, hence the end.
                scored = zip(prompt[start:], _tops(choice)[start : len(prompt)], strict=True)
                positions = [_scored(_by_id(top), token) for token, top in scored]
                self.recorder.scored(prompt, start, positions)
            return super().parse_logprobs(outputs, tokens, ctxlens, **kwargs)

        def parse_generations(self, outputs: Any, contexts: Any = (), **kwargs: Any) -> list[str]:
            choices = sorted(outputs["choices"], key=lambda choice: choice["index"])
            for choice, context in zip(choices, contexts, strict=True):
                tokens = (_id(token) for token in choice["logprobs"]["tokens"])
                chosen = zip(tokens, _tops(choice), strict=True)
                positions = [_position(token, _by_id(top)) for token, top in chosen]
                self.recorder.written(context, positions)
            return list(super().parse_generations(outputs, **kwargs))

        def _loglikelihood_tokens(self, requests: Any, **kwargs: Any) -> Any:
            results = super()._loglikelihood_tokens(requests, **kwargs)
            self.found = [self.recorder.of_scored(before, after) for _, before, after in requests]
            return results

        def generate_until(self, requests: Any, **kwargs: Any) -> Any:
            results = super().generate_until(requests, **kwargs)
            self.found = [self.recorder.of_written(request.args[0]) for request in requests]
            return results

        def begin(self, batch_size: int, salt: str) -> None:
            self._batch_size = batch_size
            self.salt = salt

    # One request at a time: what runs together is then what was sent together.
    return RecordingCompletions(batch_size=batch_size, num_concurrent=1, **arguments)


def _position(token: int, candidates: dict[int, float]) -> Position:
    return {"token": token, "candidates": candidates}


def _scored(candidates: dict[int, float], target: int) -> Position:
    """A position of given text: its token is the target if nothing is likelier, as for lm-eval."""
    best = min(candidates, key=lambda token: (-candidates[token], token != target, token))
    return _position(best, candidates)


def _values(logprobs: Mapping[int, Any]) -> dict[int, float]:
    return {token: entry.logprob for token, entry in logprobs.items()}


def _tops(choice: Mapping[str, Any]) -> list[dict[str, float]]:
    return list(choice["logprobs"]["top_logprobs"])


def _by_id(top: Mapping[str, float]) -> dict[int, float]:
    return {_id(token): logprob for token, logprob in top.items()}


def _id(token: str) -> int:
    return int(token.removeprefix("token_id:"))


MODELS = {"offline": make_offline_model, "server": make_server_model}


def evaluate(model: Any, task: str, limit: int, tasks: Any) -> dict[str, Any]:
    """One task once: lm-eval's scores, and per item its answer and the positions behind it."""
    from lm_eval import simple_evaluate

    found = simple_evaluate(
        model=model,
        tasks=[task],
        task_manager=tasks,
        samples={task: list(range(limit))},
        bootstrap_iters=0,  # the standard errors of two runs of one sample say nothing about them
    )
    scores = {
        key.partition(",")[0]: float(value)
        for key, value in found["results"][task].items()
        if "," in key and "_stderr" not in key
    }
    positions = iter(model.found)
    samples = sorted(found["samples"][task], key=lambda sample: sample["doc_id"])
    items = [_item(sample, positions) for sample in samples]
    left = sum(1 for _ in positions)
    assert not left, f"{task}: {left} recorded requests belong to no item"
    return {"scores": scores, "items": items}


def _item(sample: Mapping[str, Any], positions: Any) -> dict[str, Any]:
    # A multiple-choice item logs its arguments for every choice, in the order of the requests.
    return {
        "id": sample["doc_id"],
        "answers": [response[0] for response in sample["resps"]],
        "continuations": [str(arguments[1]) for arguments in sample["arguments"]],
        "positions": [next(positions) for _ in sample["resps"]],
    }


def main(job_path: str) -> None:
    """Run the job and write its result, whole or not at all."""
    from lm_eval.tasks import TaskManager

    job = json.loads(Path(job_path).read_text())
    tasks = TaskManager(include_path=str(TASKS), include_defaults=False)
    model = MODELS[job["path"]](job["model_arguments"], job["passes"][0]["batch_size"])
    passes: dict[str, dict[str, Any]] = {}
    for number, step in enumerate(job["passes"]):
        passes[step["name"]] = {}
        for task, limit in job["limits"].items():
            print(f"@progress {step['name']}, {task}", flush=True)
            model.begin(step["batch_size"], f"pass-{number}")
            passes[step["name"]][task] = evaluate(model, task, limit, tasks)
    write_atomically(
        Path(job["out"]), json.dumps({"platform": platform_of(job["path"]), "passes": passes})
    )


def platform_of(path: str) -> str:
    """Which platform computed in this process; of a server, `sides.py` asks the server."""
    if path == "server":
        return "remote"
    from vllm.platforms import current_platform

    return "xllm" if type(current_platform).__module__.startswith("xllm_plugin.") else "native"


if __name__ == "__main__":
    main(sys.argv[1])
