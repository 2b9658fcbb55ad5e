"""The collector's light parts: arguments, prompts and environment.  Engines: tests/engine."""

from __future__ import annotations

import base64
import json
import subprocess
import sys
from pathlib import Path

from xllm_plugin.testing.collect import Settings, _arguments, _environment, main, read_prompts

DATA = Path(__file__).parents[2] / "benchmarks" / "equality" / "data"


def test_settings_travel_through_the_command_line(tmp_path: Path) -> None:
    for settings in (
        Settings(model="/models/a"),
        Settings(
            model="/models/b",
            max_num_seqs=1,
            dtype="float32",
            eager=False,
            custom_ops=("all", "-rotary_embedding"),
            limit=16,
            alone=True,
        ),
    ):
        prompts = DATA / "prompts.jsonl"
        arguments = _arguments(settings, prompts, tmp_path / "out.json")
        found = main.make_context("collect", arguments).params
        assert (found.pop("prompts"), found.pop("out")) == (prompts, tmp_path / "out.json")
        assert Settings(**found) == settings


def test_the_childs_environment_names_platform_and_threads() -> None:
    environment = _environment(Settings(model="m", num_threads=2), "native", {"EXTRA": "1"})
    assert environment["XLLM_PLATFORM"] == "native"
    assert environment["OMP_NUM_THREADS"] == "2"
    assert environment["VLLM_ENABLE_V1_MULTIPROCESSING"] == "0"
    assert environment["EXTRA"] == "1"


def test_prompts_of_the_benchmark_are_64_different_texts() -> None:
    prompts = read_prompts(DATA / "prompts.jsonl")
    assert len({prompt.prompt_id for prompt in prompts}) == len(prompts) == 64
    assert len({prompt.text for prompt in prompts}) == 64
    assert all(prompt.image is None for prompt in prompts)


def test_an_image_travels_as_a_data_url() -> None:
    prompt = next(p for p in read_prompts(DATA / "images.jsonl") if p.image is not None)
    assert prompt.image is not None
    (message,) = prompt.messages()
    url = message["content"][0]["image_url"]["url"]
    assert base64.b64decode(url.partition(",")[2]) == prompt.image.read_bytes()
    assert message["content"][1]["text"] == prompt.text


def test_comparing_and_asking_need_no_engine() -> None:
    """Neither torch nor vLLM is imported for them."""
    modules = ("equality", "collect", "dialogues")
    lines = [f"import xllm_plugin.testing.{name}" for name in modules]
    check = "import json, sys; print(json.dumps(sorted({'torch', 'vllm'} & set(sys.modules))))"
    done = subprocess.run(
        [sys.executable, "-c", "; ".join([*lines, check])],
        capture_output=True,
        text=True,
        check=True,
    )
    assert json.loads(done.stdout) == []
