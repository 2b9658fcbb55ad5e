"""The step benchmark without an engine: accounting, floor, sides and tables."""

from __future__ import annotations

import json
import struct
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
from click.testing import CliRunner

from xllm_plugin.bench import readme, schema
from xllm_plugin.bench.commands import beside
from xllm_plugin.bench.peers import COMMON_ENVIRONMENT, peer_servers
from xllm_plugin.bench.traces import Vocabulary
from xllm_plugin.errors import ConfigError, InternalError, ModelError, SeamError
from xllm_plugin.testing.equality import Completion

FOLDER = Path(__file__).parents[2] / "benchmarks" / "step"


class Clock:
    """Stands still but for what the fake engine's methods take, in seconds."""

    def __init__(self) -> None:
        self.now_s = 0.0

    def __call__(self) -> float:
        return self.now_s


class FakeEngine:
    """Methods that call each other as vLLM's do."""

    def __init__(self, clock: Clock) -> None:
        self.clock = clock

    def step(self) -> str:
        self.clock.now_s += 0.5
        self.schedule()
        self.execute()
        return "done"

    def schedule(self) -> None:
        self.clock.now_s += 1

    def execute(self) -> None:
        self.clock.now_s += 0.25  # not timed itself: the rest's
        self.prepare()
        self.forward()

    def prepare(self) -> None:
        self.clock.now_s += 2
        self.prepare_more()

    def prepare_more(self) -> None:
        self.clock.now_s += 3

    def forward(self) -> None:
        self.clock.now_s += 10
        self.logits()

    def logits(self) -> None:
        self.clock.now_s += 4


TIMED = {
    "schedule": "scheduling",
    "prepare": "input preparation",
    "prepare_more": "input preparation",
    "forward": "forward",
    "logits": "logits",
    "step": "rest",
}


def timed_engine(bench: ModuleType) -> tuple[FakeEngine, Any]:
    clock = Clock()
    engine, timer = FakeEngine(clock), bench.parts.PartTimer(clock)
    for method, part in TIMED.items():
        timer.attach(engine, method, part)
    return engine, timer


def test_the_parts_add_up_to_the_whole(bench: ModuleType) -> None:
    engine, timer = timed_engine(bench)
    assert engine.step() == "done"
    found = timer.take_ms()
    assert found == {
        "scheduling": 1000,
        "input preparation": 5000,
        "forward": 10000,
        "logits": 4000,
        "sampling": 0,
        "bookkeeping": 0,
        "rest": 750,
    }
    assert sum(found.values()) == engine.clock.now_s * 1e3


def test_every_step_is_counted_by_itself(bench: ModuleType) -> None:
    engine, timer = timed_engine(bench)
    engine.step()
    first = timer.take_ms()
    engine.step()
    assert timer.take_ms() == first


def test_a_step_that_fails_is_closed_too(bench: ModuleType) -> None:
    engine, timer = timed_engine(bench)
    engine.logits = timer._timed(lambda: 1 / 0, "logits")  # type: ignore[method-assign]
    with pytest.raises(ZeroDivisionError):
        engine.step()
    assert timer.take_ms()["forward"] == 10000
    assert timer._inner_s == engine.clock.now_s


def test_an_engine_without_the_method_is_told(bench: ModuleType) -> None:
    with pytest.raises(SeamError, match="FakeEngine has no method '_bookkeeping_sync'"):
        bench.parts.PartTimer().attach(FakeEngine(Clock()), "_bookkeeping_sync", "bookkeeping")


class FakeSteps:
    """An `LLMEngine` with so many steps left."""

    def __init__(self, engine: Any, num_left: int) -> None:
        self.engine, self.num_left = engine, num_left

    def has_unfinished_requests(self) -> bool:
        return self.num_left > 0

    def step(self) -> None:
        self.num_left -= 1
        self.engine.steps.append(self.engine.kind(tokens=(1,), parts_ms={"forward": 1.0}))


def test_an_engine_goes_on_by_turns_and_says_when_it_is_done(bench: ModuleType) -> None:
    driver = beside(FOLDER, "driver")
    engine = driver.Engine.__new__(driver.Engine)
    engine.kind, engine.steps = bench.parts.Step, []
    engine.llm = SimpleNamespace(llm_engine=FakeSteps(engine, 5))
    turns = [driver.go_on(engine, {"num_steps": 4}) for _ in range(2)]
    assert [len(turn["steps"]) for turn in turns] == [4, 1]
    assert [turn["has_more"] for turn in turns] == [True, False]


def test_methods_belong_to_known_parts(bench: ModuleType) -> None:
    for methods in bench.parts.METHODS.values():
        assert set(methods.values()) <= set(bench.parts.PARTS)


def step(bench: ModuleType, whole_ms: float, tokens: tuple[int, ...] = (1,)) -> Any:
    shares = dict.fromkeys(bench.parts.PARTS, 0.0) | {"forward": 0.75 * whole_ms}
    return bench.parts.Step(tokens, shares | {"rest": 0.25 * whole_ms})


def test_only_pure_steps_count(bench: ModuleType) -> None:
    assert step(bench, 1, (1, 1)).is_decode(2)
    assert not step(bench, 1, (1, 1)).is_decode(3)
    assert not step(bench, 1, (1, 256)).is_decode(2)
    assert step(bench, 1, (256,)).is_prefill(256)
    assert not step(bench, 1, (1, 255)).is_prefill(256)


def test_an_interrupted_step_is_not_typical(bench: ModuleType) -> None:
    steps = [step(bench, whole_ms) for whole_ms in (500, 20, 22, 1)]
    typical = bench.parts.typical(steps)
    assert sum(typical.values()) == pytest.approx(21)
    assert typical["forward"] == pytest.approx(0.75 * 21)
    assert bench.parts.typical([step(bench, 8)])["rest"] == 2


def test_no_pure_step_is_our_bug(bench: ModuleType) -> None:
    with pytest.raises(InternalError, match="only decode, batch 4"):
        bench.typical_step(bench.Point("decode", 4), {"steps": []})


def write_model(folder: Path, tensors: dict[str, list[int]], **config: Any) -> Path:
    header = {name: {"dtype": "BF16", "shape": shape} for name, shape in tensors.items()}
    encoded = json.dumps(header | {"__metadata__": {"format": "pt"}}).encode()
    path = folder / "model.safetensors"
    path.write_bytes(struct.pack("<Q", len(encoded)) + encoded)
    (folder / "config.json").write_text(json.dumps(config))
    return folder


TENSORS = {
    "model.embed_tokens.weight": [1000, 8],
    "model.layers.0.mlp.up_proj.weight": [100, 8],
    "model.norm.weight": [8],
}
CONFIG = {
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "num_hidden_layers": 3,
    "hidden_size": 8,
    "vocab_size": 1000,
}


@pytest.mark.parametrize("head", [{}, {"lm_head.weight": [1000, 8]}])
def test_a_shared_embedding_is_read_once_for_its_head(
    bench: ModuleType, tmp_path: Path, head: dict[str, list[int]]
) -> None:
    work = bench.floor.Work.of_model(write_model(tmp_path, TENSORS | head, **CONFIG))
    assert work.body_parameters == 808
    assert work.weight_bytes == 2 * (808 + 8000)
    assert work.kv_bytes_per_token == 2 * 3 * 2 * 2 * 2  # K and V, layers, heads, size, bytes
    assert work.attention_flop_per_pair == 4 * 3 * 4 * 2


def test_the_floor_is_the_longer_of_reading_and_computing(bench: ModuleType) -> None:
    machine = bench.floor.Machine(read_bytes_per_s=1e6, bf16_flop_per_s=1e6)
    work = bench.floor.Work(400, 100, kv_bytes_per_token=10, attention_flop_per_pair=1)
    one = work.decode(1, 50, machine)
    assert (one.weights_ms, one.kv_ms) == (1.0, 0.5)
    assert one.arithmetic_ms == pytest.approx((2 * 500 + 50) / 1e3)
    assert one.bound_ms == 1.5
    many = work.decode(64, 50, machine)
    assert many.weights_ms == one.weights_ms
    assert many.bound_ms == many.arithmetic_ms
    prompt = work.prefill(10, machine)
    assert prompt.kv_ms == 0
    assert prompt.arithmetic_ms == pytest.approx((2 * 10 * 400 + 2 * 100 + 55) / 1e3)


@pytest.mark.parametrize(("missing", "message"), [("config", "config.json"), ("tensors", "safete")])
def test_a_folder_without_a_model_is_told(
    bench: ModuleType, tmp_path: Path, missing: str, message: str
) -> None:
    write_model(tmp_path, TENSORS, **CONFIG)
    for path in tmp_path.glob("*.json" if missing == "config" else "*.safetensors"):
        path.unlink()
    with pytest.raises(ModelError, match=message):
        bench.floor.Work.of_model(tmp_path)


def test_a_model_of_another_kind_is_told(bench: ModuleType, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="num_attention_heads"):
        bench.floor.Work.of_model(write_model(tmp_path, TENSORS, vocab_size=3))


def test_the_stock_side_is_the_peer_of_the_serving_benchmark(bench: ModuleType) -> None:
    (peer,) = peer_servers("/m", port=1, names=("stock-best",))
    assert bench.sides.environment("stock-best") == peer.environment


def test_the_xllm_side_is_not_tuned(bench: ModuleType) -> None:
    assert bench.sides.environment("xllm") == {
        **COMMON_ENVIRONMENT,
        "XLLM_PLATFORM": "xllm",
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    }


def test_the_other_platform_s_answer_is_refused(bench: ModuleType) -> None:
    bench.sides.require_fair({"stock-best": {"platform": "native"}, "xllm": {"platform": "xllm"}})
    with pytest.raises(InternalError, match="'native' answered for xllm"):
        bench.sides.require_fair({"xllm": {"platform": "native"}})


def child(bench: ModuleType, tmp_path: Path, program: str) -> Any:
    return bench.sides.Child("side", {}, tmp_path / "log", command=(sys.executable, "-c", program))


def test_a_child_answers_jobs_and_is_ended(bench: ModuleType, tmp_path: Path) -> None:
    echo = "import sys\nfor line in sys.stdin: print(line, end='', flush=True)"
    with child(bench, tmp_path, echo) as side:
        assert side.ask({"do": "this"}) == {"do": "this"}
        process = side._process
    assert process.returncode is not None


def test_no_two_jobs_share_a_prompt(bench: ModuleType) -> None:
    points = [bench.Point("decode", 8), bench.Point("decode", 16), bench.Point("prefill", 256)]
    jobs = [point.job(range(1000), repeat) for point in points for repeat in range(2)]
    prompts = [tuple(prompt) for job in jobs for prompt in job["prompts"]]
    assert len(set(prompts)) == len(prompts)
    assert jobs[0] == points[0].job(range(1000), 0)


def test_the_engine_has_room_for_every_point(bench: ModuleType, tmp_path: Path) -> None:
    points = (bench.Point("decode", 2), bench.Point("prefill", 2048))
    job = bench.Plan(tmp_path, Vocabulary(10), points, 1, tmp_path).start_job()
    assert job["max_batch"] >= 8  # the compared prompts
    assert job["max_model_len"] > 2048
    assert (job["batches"], job["prefills"]) == ([2], [2048])


class FakeChild:
    """Answers an `outputs_job` with the same token everywhere."""

    def __init__(self, name: str, token: int) -> None:
        self.name, self._token = name, token

    def ask(self, job: dict[str, Any]) -> dict[str, Any]:
        scores = {self._token: -0.1, 3 - self._token: -5.0}
        answers = [
            Completion(
                str(number),
                (self._token,) * job["max_tokens"],
                (-0.1,) * job["max_tokens"],
                (scores,) * job["max_tokens"],
            ).to_dict()
            for number, _ in enumerate(job["prompts"])
        ]
        return {"alone": answers, "together": answers}


def test_outputs_of_two_engines_are_compared(bench: ModuleType) -> None:
    stock, other = FakeChild("stock-best", 1), FakeChild("other", 2)
    same = bench.sides.compare_outputs(stock, FakeChild("xllm", 1), Vocabulary(10))
    assert (same.passed, same.name) == (True, "outputs of xllm equal those of stock-best")
    assert not bench.sides.compare_outputs(stock, other, Vocabulary(10)).passed


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--batches", "none"], "sizes 'none'"),
        (["--batches", "0"], "sizes '0'"),
        (["--prefills", "256,-1"], "sizes '256,-1'"),
        (["--batches", "65"], "at most 64 requests"),
        (["--prefills", "4096"], "at most 2048 tokens"),
    ],
)
def test_misuse_ends_before_anything_starts(
    bench: ModuleType, arguments: list[str], message: str
) -> None:
    result = CliRunner().invoke(bench.command, arguments)
    assert isinstance(result.exception, ConfigError)
    assert message in str(result.exception)


def found(bench: ModuleType, point: Any) -> Any:
    machines = [bench.floor.Machine(1e6, 1e9)] * 2
    steps = {
        (point, "stock-best"): [dict(step(bench, ms).parts_ms) for ms in (20.0, 40.0)],
        (point, "xllm"): [dict(step(bench, ms).parts_ms) for ms in (10.0, 30.0)],
    }
    return bench.Found(machines, steps, {"stock-best": 2, "xllm": 2})


def test_ratios_are_taken_within_a_repeat(bench: ModuleType) -> None:
    point = bench.Point("decode", 1)
    work = bench.floor.Work(2000, 500, 0, 0)
    (row,) = bench.whole_rows(found(bench, point), [point], work)
    assert row.labels == {"step": "decode, batch 1"}
    assert row.figure("floor").median == 5
    ratio = row.figure("xllm / stock-best")
    assert (ratio.minimum, ratio.maximum) == (0.5, 0.75)
    assert row.figure("xllm / floor").maximum == 6


def test_the_tables_can_be_rendered(bench: ModuleType, tmp_path: Path) -> None:
    point = bench.Point("prefill", 256)
    work = bench.floor.Work(2000, 500, 0, 0)
    outcome = found(bench, point)
    plan = bench.Plan(tmp_path, Vocabulary(10), (point,), 2, tmp_path)
    run = schema.begin(bench.NAME, question=bench.QUESTION, command="xllm bench step")
    result = run.finish(
        peers=[bench.sides.peer(side) for side in bench.sides.SIDES],
        rows=[
            *bench.whole_rows(outcome, [point], work),
            *bench.part_rows(outcome, [point]),
            *bench.floor_rows(outcome, [point], work),
            *bench.machine_rows(outcome.machines),
        ],
        notes=bench.notes(plan, work, outcome),
    )
    text = readme.render(result)
    assert "| prefill, 256 tokens | 5 | 30 (20-40) | 20 (10-30) |" in text
    assert "| prefill, 256 tokens | xllm | 0 | 0 | 15 (7.50-22.5) | 0 | 0 | 0 |" in text


def test_the_readme_has_a_place_for_the_table() -> None:
    assert readme.section((FOLDER / "README.md").read_text(), "step")
