"""What a worker does when its engine is sent to sleep, over a runner that only writes down."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch")

from xllm_plugin import shims  # noqa: E402
from xllm_plugin.cpu.testkit import FaultyVmCalls  # noqa: E402
from xllm_plugin.errors import InternalError, MisuseError, NotNowError  # noqa: E402

pytestmark = pytest.mark.engine  # imports vLLM, some seconds


class FakeRunner:
    """A model of one layer, and what was asked."""

    def __init__(self) -> None:
        self.model = torch.nn.Linear(64, 64 * 64, bias=False)
        self.first = self.model.weight.detach().clone()
        self.asked: list[str] = []
        self.refusal: str | None = None

    def get_model(self) -> Any:
        return self.model

    def reload_weights(self) -> None:
        self.asked.append("reload")
        with torch.no_grad():
            self.model.weight.copy_(self.first)

    def reload_refusal(self) -> str | None:
        return self.refusal

    def sleep_kv_cache(self) -> None:
        self.asked.append("sleep")

    def wake_kv_cache(self) -> None:
        self.asked.append("wake")

    def is_whole(self) -> bool:
        return bool(torch.equal(self.model.weight, self.first))


@pytest.fixture
def runner() -> FakeRunner:
    return FakeRunner()


@pytest.fixture
def make(runner: FakeRunner, tmp_path: Path) -> Any:
    shims.install()
    pytest.importorskip("vllm")
    from xllm_plugin.cpu.sleep import SleepMode
    from xllm_plugin.cpu.weight_memory import WeightMemory

    def mode(directory: Path = tmp_path, calls: Any = None) -> Any:
        return SleepMode(runner, WeightMemory(directory, calls))

    return mode


@pytest.mark.parametrize(("level", "loads"), [(1, []), (2, ["reload"])])
def test_a_worker_wakes_as_it_fell_asleep(
    make: Any, runner: FakeRunner, level: int, loads: list[str]
) -> None:
    mode = make()
    mode.check_awake(8)
    mode.sleep(level)
    assert not runner.is_whole()
    mode.check_awake(0)
    with pytest.raises(InternalError, match="8 tokens"):
        mode.check_awake(8)
    mode.wake_up()
    assert runner.is_whole()
    assert runner.asked == ["sleep", *loads, "wake"]
    mode.check_awake(8)


def test_parts_wake_one_by_one(make: Any, runner: FakeRunner) -> None:
    mode = make()
    mode.sleep(1)
    mode.wake_up(["weights"])
    assert runner.is_whole()
    with pytest.raises(InternalError, match="sleeps"):
        mode.check_awake(1)
    mode.wake_up(["kv_cache"])
    mode.check_awake(1)
    assert runner.asked == ["sleep", "wake"]


def test_the_kv_cache_can_go_alone(make: Any, runner: FakeRunner) -> None:
    mode = make()
    mode.discard(("kv_cache",))
    assert runner.is_whole()
    with pytest.raises(InternalError, match="sleeps"):
        mode.check_awake(1)
    mode.wake_up(["kv_cache"])
    mode.check_awake(1)
    with pytest.raises(MisuseError, match="only kv_cache"):
        mode.discard(("weights",))


def test_a_sleep_that_fails_leaves_the_worker_awake(
    make: Any, runner: FakeRunner, tmp_path: Path
) -> None:
    blocked = tmp_path / "file"
    blocked.write_text("")
    mode = make(blocked)
    with pytest.raises(NotNowError):
        mode.sleep(1)
    mode.check_awake(1)
    assert runner.is_whole()
    assert runner.asked == ["sleep", "wake"]


def test_level_2_is_refused_where_nothing_could_be_loaded_again(
    make: Any, runner: FakeRunner
) -> None:
    mode = make()
    runner.refusal = "--load-format dummy has no files to load from"
    with pytest.raises(MisuseError, match=r"dummy.*level 1"):
        mode.sleep(2)
    assert runner.asked == []
    mode.sleep(1)


@pytest.mark.parametrize("level", [0, 3])
def test_other_levels_are_refused(make: Any, level: int) -> None:
    with pytest.raises(MisuseError, match="give 1"):
        make().sleep(level)


def test_unknown_tags_are_refused(make: Any) -> None:
    with pytest.raises(MisuseError, match="weights, kv_cache or both"):
        make().wake_up(["graphs"])


@pytest.mark.parametrize(("level", "loads"), [(1, []), (2, ["reload"])])
def test_a_sleep_that_the_kernel_refuses_half_way_is_undone(
    make: Any, runner: FakeRunner, level: int, loads: list[str]
) -> None:
    calls = FaultyVmCalls()
    mode = make(calls=calls)
    calls.drop_fault.set(1)
    with pytest.raises(NotNowError, match="did not take the weights' memory"):
        mode.sleep(level)
    mode.check_awake(8)
    assert runner.is_whole()
    assert runner.asked == ["sleep", "wake", *loads]
    mode.sleep(level)
    mode.wake_up()
    assert runner.is_whole()


def gone(*_: object) -> None:
    raise OSError("a disk that is gone")


@pytest.mark.parametrize("level", [1, 2])
def test_a_sleep_that_could_not_be_undone_is_no_time_for_a_step_and_is_undone_by_the_next(
    make: Any, runner: FakeRunner, monkeypatch: pytest.MonkeyPatch, level: int
) -> None:
    from xllm_plugin.cpu import weight_memory

    calls = FaultyVmCalls()
    mode = make(calls=calls)
    calls.drop_fault.set(1)
    each = weight_memory._each
    with monkeypatch.context() as patch:
        patch.setattr(runner, "reload_weights", gone)
        patch.setattr(
            weight_memory,
            "_each",
            lambda call, run: (gone if call.__name__ == "readinto" else each)(call, run),
        )
        for _ in range(2):  # the second one fails before it begins
            with pytest.raises(
                NotNowError, match=r"disk that is gone\. .*POST /sleep again.*not call /wake_up"
            ) as caught:
                mode.sleep(level)
            assert "resumes it" not in str(caught.value)
            assert "/wake_up again" not in str(caught.value)
    with pytest.raises(InternalError, match="8 tokens"):
        mode.check_awake(8)
    mode.sleep(1)
    mode.wake_up()
    assert runner.is_whole()
    mode.check_awake(8)


def test_weights_that_cannot_be_read_back_on_waking_are_asked_for_again(
    make: Any, runner: FakeRunner, monkeypatch: pytest.MonkeyPatch
) -> None:
    from xllm_plugin.cpu import weight_memory

    mode = make()
    mode.sleep(1)
    with monkeypatch.context() as patch:
        patch.setattr(weight_memory, "_each", gone)
        with pytest.raises(NotNowError, match=r"cannot be read back.*Call /wake_up again"):
            mode.wake_up()
    mode.wake_up()
    assert runner.is_whole()


def test_a_kv_cache_that_is_neither_dropped_nor_back_is_no_time_for_a_step(
    make: Any, runner: FakeRunner, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refused() -> None:
        raise NotNowError("no page")

    mode = make()
    with monkeypatch.context() as patch:
        patch.setattr(runner, "sleep_kv_cache", refused)
        with pytest.raises(NotNowError, match=r"no page$"):
            mode.sleep(1)
        mode.check_awake(8)
        patch.setattr(runner, "wake_kv_cache", refused)
        with pytest.raises(NotNowError, match=r"no page\. .*POST /sleep again"):
            mode.sleep(1)
        with pytest.raises(InternalError, match="8 tokens"):
            mode.check_awake(8)
        patch.undo()
        patch.setattr(runner, "sleep_kv_cache", refused)
        with pytest.raises(NotNowError, match=r"no page$"):
            mode.sleep(1)
        mode.check_awake(8)  # which brought back what the sleep before had left away
    mode.sleep(1)
    mode.wake_up()
    mode.check_awake(8)
