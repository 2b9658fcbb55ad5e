"""Plugins: built-ins always, third parties by entry point, and a broken one is named."""

from __future__ import annotations

from typing import Any

import pytest

from xllm_plugin.accelerator.family import DeviceFamily, Probe
from xllm_plugin.errors import ConfigError
from xllm_plugin.plugins import (
    LOAD_ENV,
    PluginInfo,
    build_manager,
    describe,
    device_families,
    manager_here,
    routing_policies,
)

FAMILY_MODULE = """
    from xllm_plugin.accelerator.family import DeviceFamily, Probe
    from xllm_plugin.hookspecs import hookimpl

    @hookimpl
    def register_device_families(register):
        probe = Probe(usable=True, looked_for="a toy", found="a toy")
        register(DeviceFamily("{family}", {preference}, "toy.Platform", lambda: probe))
"""

HOOK = "from xllm_plugin.hookspecs import hookimpl\n@hookimpl\n"


def add_vendor(site: Any, name: str, family: str = "toy", preference: int = 5) -> None:
    """Install a distribution that brings one device family."""
    module = f"{name}_families"
    site.add_module(module, FAMILY_MODULE.format(family=family, preference=preference))
    site.add_distribution(f"{name}-dist", "1.2", {"xllm_plugin": {name: module}})


def names(only: str | None = None) -> list[str]:
    return [family.name for family in device_families(build_manager(only))]


def test_the_cpu_family_is_built_in() -> None:
    assert "cpu" in names("")


def test_building_a_manager_imports_nothing_heavy(run_python: Any) -> None:
    done = run_python(
        "-c",
        "import sys; from xllm_plugin.plugins import build_manager; build_manager('');"
        "print([m for m in ('torch', 'vllm', 'fastapi', 'transformers') if m in sys.modules])",
    )
    assert (done.stdout, done.returncode) == ("[]\n", 0), done.stderr


def test_an_installed_plugin_is_found_and_preferred_families_come_first(site_here: Any) -> None:
    add_vendor(site_here, "eager", "toy_first", preference=1000)
    add_vendor(site_here, "humble", "toy_last", preference=-1)
    assert names()[0] == "toy_first"
    assert names()[-1] == "toy_last"


def test_the_variable_names_the_plugins_to_load(
    site_here: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    add_vendor(site_here, "one", "toy_one")
    add_vendor(site_here, "two", "toy_two")
    everything = set(names())
    assert {"toy_one", "toy_two"} <= everything
    assert set(names("")) == everything - {"toy_one", "toy_two"}
    assert set(names(" two , ")) == everything - {"toy_one"}
    monkeypatch.setenv(LOAD_ENV, "one")
    loaded = {family.name for family in device_families(manager_here())}
    assert loaded == everything - {"toy_two"}


def test_a_plugin_that_is_left_out_is_not_imported(site_here: Any) -> None:
    site_here.add_module("exploding", "raise RuntimeError('imported')")
    site_here.add_distribution("exploding-dist", entry_points={"xllm_plugin": {"x": "exploding"}})
    build_manager("")


def test_a_plugin_that_is_not_installed(site_here: Any) -> None:
    add_vendor(site_here, "one", "toy_one")
    with pytest.raises(ConfigError, match=f"{LOAD_ENV}: no plugin named 'three'") as caught:
        build_manager("one,three")
    assert "['one']" in str(caught.value)


@pytest.mark.parametrize(
    ("source", "value", "reason"),
    [
        ("import no_such_library", "broken_module", "No module named 'no_such_library'"),
        ("raise RuntimeError('no driver')", "broken_module", "no driver"),
        ("def (", "broken_module", "invalid syntax"),
        ("x = 1", "broken_module:Plugin", "has no attribute 'Plugin'"),
        ("x = 1", "absent_module", "No module named 'absent_module'"),
        (
            HOOK + "def register_device_families(nothing_we_give): ...",
            "broken_module",
            "nothing_we_give",
        ),
        (
            HOOK + "def register_devices(): ...",
            "broken_module",
            "unknown hook 'register_devices'",
        ),
    ],
)
def test_a_broken_plugin_is_named(site_here: Any, source: str, value: str, reason: str) -> None:
    site_here.add_module("broken_module", source)
    site_here.add_distribution("broken-dist", entry_points={"xllm_plugin": {"broken": value}})
    with pytest.raises(ConfigError) as caught:
        build_manager()
    message = str(caught.value)
    assert f"plugin 'broken' ({value}) cannot be loaded: " in message
    assert reason in message
    assert LOAD_ENV in message


def test_two_families_of_one_name(site_here: Any) -> None:
    add_vendor(site_here, "one", "toy")
    add_vendor(site_here, "two", "toy")
    with pytest.raises(ConfigError, match="two plugins register a device family named 'toy'"):
        names()


def test_what_is_registered_is_described(site_here: Any) -> None:
    add_vendor(site_here, "vendor")
    found = {info.name: info for info in describe(build_manager())}
    hooks = ("register_device_families",)
    assert found["vendor"] == PluginInfo("vendor", "vendor-dist 1.2", hooks)
    builtin = "xllm_plugin.cpu.accelerator"
    assert found[builtin] == PluginInfo(builtin, "built in", hooks)


def test_every_builtin_family_keeps_the_record_s_promises() -> None:
    for family in device_families(build_manager("")):
        assert isinstance(family, DeviceFamily)
        probe = family.probe()
        assert isinstance(probe, Probe)
        assert probe.looked_for
        assert probe.found
        assert family.platform_class.startswith(f"xllm_plugin.{family.name}.")


POLICY_MODULE = """
    from xllm_plugin.hookspecs import hookimpl
    from xllm_plugin.service.policy import Choice, RoutingPolicy

    @hookimpl
    def register_routing_policies(register):
        register(RoutingPolicy("{name}", "the first", lambda request, there: Choice(0, "first")))
"""


def test_a_plugin_brings_a_routing_policy(site_here: Any) -> None:
    site_here.add_module("vendor_policies", POLICY_MODULE.format(name="first"))
    site_here.add_distribution(
        "vendor-dist", entry_points={"xllm_plugin": {"v": "vendor_policies"}}
    )
    policies = routing_policies(build_manager())
    assert {"first", "least-loaded"} <= set(policies)
    assert policies["first"].choose(None, [None]).index == 0  # type: ignore[arg-type, list-item]


def test_two_policies_of_one_name(site_here: Any) -> None:
    site_here.add_module("vendor_policies", POLICY_MODULE.format(name="session"))
    site_here.add_distribution(
        "vendor-dist", entry_points={"xllm_plugin": {"v": "vendor_policies"}}
    )
    with pytest.raises(ConfigError, match="two plugins register a routing policy named 'session'"):
        routing_policies(build_manager())
