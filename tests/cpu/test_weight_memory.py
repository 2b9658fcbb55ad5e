"""The memory of weights goes and comes back with what it held, at the same addresses."""

from __future__ import annotations

import mmap
from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch")
psutil = pytest.importorskip("psutil")

from xllm_plugin import shims  # noqa: E402
from xllm_plugin.cpu.testkit import FaultyVmCalls  # noqa: E402
from xllm_plugin.errors import NotNowError  # noqa: E402

pytestmark = pytest.mark.engine  # imports vLLM, some seconds

PAGE = mmap.PAGESIZE
NUM_BYTES = 64 * 2**20


@pytest.fixture(scope="module", autouse=True)
def weight_memory() -> Any:
    shims.install()
    pytest.importorskip("vllm")
    from xllm_plugin.cpu import weight_memory

    return weight_memory


@pytest.fixture
def model() -> Any:
    """One large layer, one too small for a page, a shared one, a buffer, one that is packed."""
    model = torch.nn.Module()
    model.large = torch.nn.Linear(4096, NUM_BYTES // 4 // 4096, bias=False)
    model.tied = torch.nn.Module()
    model.tied.weight = model.large.weight
    model.small = torch.nn.Linear(3, 3)
    model.register_buffer("table", torch.arange(2 * PAGE))
    packed = torch.full((NUM_BYTES // 2,), 3.0, dtype=torch.bfloat16)
    model.small.cpu_linear = lambda x: packed[:x]
    return model


def contents(model: Any) -> dict[str, Any]:
    found = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    return found | {"packed": model.small.cpu_linear(NUM_BYTES // 2).clone()}


def addresses(model: Any) -> list[int]:
    tensors = [*model.parameters(), *model.buffers(), model.small.cpu_linear(1)]
    return [tensor.data_ptr() for tensor in tensors]


def resident_bytes() -> int:
    found: int = psutil.Process().memory_info().rss
    return found


def test_parked_weights_take_no_memory_and_come_back(
    weight_memory: Any, model: Any, tmp_path: Path
) -> None:
    memory = weight_memory.WeightMemory(tmp_path)
    expected, places, before = contents(model), addresses(model), resident_bytes()
    num_bytes = memory.park(model)
    assert 2 * NUM_BYTES <= num_bytes + 4 * PAGE < 2 * NUM_BYTES + 64 * PAGE
    assert before - resident_bytes() > 1.8 * NUM_BYTES
    assert not list(tmp_path.iterdir()), "a killed process would leave the file"
    assert memory.is_away
    assert memory.is_kept
    memory.restore()
    assert not memory.is_away
    assert addresses(model) == places
    found = contents(model)
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())


def test_dropped_weights_are_zeros_and_buffers_stay(
    weight_memory: Any, model: Any, tmp_path: Path
) -> None:
    memory = weight_memory.WeightMemory(tmp_path)
    before = resident_bytes()
    memory.drop(model)
    assert before - resident_bytes() > 1.8 * NUM_BYTES
    assert memory.is_away
    assert not memory.is_kept
    assert torch.equal(model.table, torch.arange(2 * PAGE))
    assert not model.large.weight[2, 2:8].any()
    memory.restore()
    assert not memory.is_away


def test_weights_that_cannot_be_written_stay(
    weight_memory: Any, model: Any, tmp_path: Path
) -> None:
    blocked = tmp_path / "file"
    blocked.write_text("")
    memory = weight_memory.WeightMemory(blocked / "sleep")
    expected = contents(model)
    with pytest.raises(NotNowError, match=r"sleep_dir.*/wake_up"):
        memory.park(model)
    assert not memory.is_away
    found = contents(model)
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())


def test_pages_are_whole_and_of_the_weights_alone(weight_memory: Any) -> None:
    base = torch.zeros(5 * PAGE, dtype=torch.int8)
    start = base.data_ptr()
    runs = weight_memory.whole_pages([base, base[PAGE:], torch.zeros(3)])
    (run,) = runs
    assert run.address % PAGE == run.num_bytes % PAGE == 0
    assert start <= run.address
    assert run.address + run.num_bytes <= start + 5 * PAGE
    assert run.num_bytes in {4 * PAGE, 5 * PAGE}


def test_weights_that_were_parked_before_the_kernel_refused_can_be_restored(
    weight_memory: Any, model: Any, tmp_path: Path
) -> None:
    calls = FaultyVmCalls()
    memory = weight_memory.WeightMemory(tmp_path, calls)
    expected = contents(model)
    calls.drop_fault.set(2)
    with pytest.raises(NotNowError, match=r"did not take the weights' memory.*/wake_up"):
        memory.park(model)
    assert memory.is_away
    assert memory.is_kept
    memory.restore()
    assert not memory.is_away
    assert not memory.is_kept
    found = contents(model)
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())


def test_what_cannot_be_read_back_is_away_and_kept(
    weight_memory: Any, model: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    memory = weight_memory.WeightMemory(tmp_path)
    expected, each = contents(model), weight_memory._each

    def each_written(call: Any, run: Any) -> None:
        if call.__name__ == "readinto":
            raise OSError("a disk that is gone")
        each(call, run)

    memory.park(model)
    with monkeypatch.context() as patch:
        patch.setattr(weight_memory, "_each", each_written)
        with pytest.raises(NotNowError, match="cannot be read back"):
            memory.restore()
    assert memory.is_away
    assert memory.is_kept
    memory.restore()
    found = contents(model)
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())


def test_weights_that_were_dropped_before_the_kernel_refused_are_told_of(
    weight_memory: Any, model: Any, tmp_path: Path
) -> None:
    calls = FaultyVmCalls()
    memory = weight_memory.WeightMemory(tmp_path, calls)
    calls.drop_fault.set(2)
    with pytest.raises(NotNowError, match="did not take"):
        memory.drop(model)
    assert memory.is_away
    assert not memory.is_kept
