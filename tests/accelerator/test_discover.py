"""Which device family is chosen, and what is said when none is."""

from __future__ import annotations

import pytest

from xllm_plugin.accelerator.discover import choose
from xllm_plugin.accelerator.family import Capabilities, DeviceFamily, Probe
from xllm_plugin.errors import PlatformError


def family(name: str, *, usable: bool) -> DeviceFamily:
    found = f"a {name}" if usable else "nothing"
    return DeviceFamily(
        name, 0, f"{name}.Platform", lambda: Probe(usable, f"a {name} driver", found)
    )


FAMILIES = (family("npu", usable=False), family("cuda", usable=True), family("cpu", usable=True))


def test_the_first_usable_one_is_chosen() -> None:
    choice = choose(FAMILIES, None)
    assert choice.family is FAMILIES[1]
    assert choice.probe.usable
    assert choice.reason == "a cuda; first usable of npu, cuda, cpu"


def test_the_named_one_is_chosen() -> None:
    choice = choose(FAMILIES, "cpu")
    assert (choice.family, choice.reason) == (FAMILIES[2], "XLLM_DEVICE=cpu")


def test_only_the_named_one_is_probed() -> None:
    def unexpected() -> Probe:
        raise AssertionError

    other = DeviceFamily("other", 9, "other.Platform", unexpected)
    assert choose((other, FAMILIES[2]), "cpu").family is FAMILIES[2]


def test_a_named_one_that_is_not_usable() -> None:
    with pytest.raises(PlatformError, match="XLLM_DEVICE=npu: not usable here") as caught:
        choose(FAMILIES, "npu")
    assert "looked for a npu driver; found nothing" in str(caught.value)
    assert "Unset XLLM_DEVICE to take the first usable of npu, cuda, cpu" in str(caught.value)


@pytest.mark.parametrize(("families", "names"), [(FAMILIES, "npu, cuda, cpu"), ((), "none")])
def test_an_unknown_name(families: tuple[DeviceFamily, ...], names: str) -> None:
    with pytest.raises(PlatformError, match="XLLM_DEVICE=gpu: no such device family") as caught:
        choose(families, "gpu")
    assert f"found {names}. Unset XLLM_DEVICE" in str(caught.value)


def test_names_are_exact() -> None:
    with pytest.raises(PlatformError, match="XLLM_DEVICE=CPU"):
        choose(FAMILIES, "CPU")


def test_none_usable_explains_each() -> None:
    families = (family("npu", usable=False), family("tpu", usable=False))
    with pytest.raises(PlatformError, match="no device family is usable here") as caught:
        choose(families, None)
    assert "npu: looked for a npu driver; found nothing" in str(caught.value)
    assert "tpu: looked for a tpu driver; found nothing" in str(caught.value)
    assert "--platform native" in str(caught.value)


def test_capabilities_claim_no_more_than_eager_unless_said() -> None:
    assert Capabilities() == Capabilities(("eager",), None, None)
    assert FAMILIES[0].capabilities == Capabilities()
