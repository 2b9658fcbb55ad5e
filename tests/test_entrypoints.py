"""What vLLM calls, in processes of their own: the choice holds, and a mistake never passes quietly.

Importing vLLM takes some seconds, so few of the children do, and each answers many questions.
"""

from __future__ import annotations

import importlib.util
import json
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest

GROUP = "vllm.platform_plugins"

# What `native` may import of ours, and nothing else.
NATIVE_MODULES = {
    "xllm_plugin",
    "xllm_plugin.entrypoints",
    "xllm_plugin.errors",
    "xllm_plugin.selection",
    "xllm_plugin.shims",
    "xllm_plugin.shims.loader",
    "xllm_plugin.shims.metadata",
    "xllm_plugin.shims.torchaudio",
    "xllm_plugin.shims.torchcodec",
    "xllm_plugin.shims.torchvision",
}

# Prints one JSON line about the process that calls `show`.
WITNESS = """
    import json, os, sys

    def show():
        from vllm.platforms import current_platform
        from vllm.plugins import load_general_plugins
        load_general_plugins()
        kind = type(current_platform)
        print(json.dumps({
            "platform": f"{kind.__module__}.{kind.__qualname__}",
            "ours": sorted(n for n in sys.modules if n.partition(".")[0] == "xllm_plugin"),
            "argv": sys.argv,
            "exported": {n: v for n, v in os.environ.items() if n.startswith("XLLM_")},
        }), flush=True)

    def show_in_spawned_child():
        import multiprocessing
        child = multiprocessing.get_context("spawn").Process(target=show)
        child.start()
        child.join()
        sys.exit(child.exitcode)
"""

# Asks our entry point as vLLM does, without the cost of importing vLLM.
ASK = "import sys; sys.argv = {argv!r}; from xllm_plugin.entrypoints import platform; print({ask})"
COMMAND = ["vllm", "serve", "m"]

needs_vllm = pytest.mark.skipif(
    importlib.util.find_spec("vllm") is None, reason="vLLM is not installed"
)


def ask(run_python: Any, argv: list[str], *, what: str = "platform()", **environment: str) -> Any:
    return run_python("-c", ASK.format(argv=argv, ask=what), **environment)


def witness_lines(done: Any) -> list[dict[str, Any]]:
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in done.stdout.splitlines() if line.startswith('{"platform"')]


def add_rival(site: Any) -> None:
    """Install another vendor's platform, which is vLLM's CPU one under its own name."""
    site.add_module(
        "rival",
        """
        def platform():
            return "rival_platform.RivalPlatform"
        """,
    )
    site.add_module(
        "rival_platform",
        """
        from vllm.platforms.cpu import CpuPlatform

        class RivalPlatform(CpuPlatform): ...
        """,
    )
    site.add_distribution("rival-dist", entry_points={GROUP: {"rival": "rival:platform"}})


@needs_vllm
@pytest.mark.engine
def test_by_default_vllm_runs_on_us(run_python: Any, site: Any) -> None:
    site.add_module("witness", WITNESS)
    done = run_python("-c", "import witness; witness.show()", XLLM_DEVICE="cpu")
    (seen,) = witness_lines(done)
    assert seen["platform"] == "xllm_plugin.cpu.platform.XllmCpuPlatform"
    assert seen["exported"]["XLLM_PLATFORM"] == "xllm"
    assert "xllm_plugin.seams" in seen["ours"], "the general plugin has checked them"


@needs_vllm
@pytest.mark.engine
def test_native_leaves_vllm_untouched_here_and_in_spawned_children(
    run_python: Any, site: Any
) -> None:
    site.add_module("witness", WITNESS)
    done = run_python(
        "-c",
        "import sys; sys.argv = ['vllm', 'serve', '--platform', 'native', 'm']\n"
        "import witness; witness.show(); witness.show_in_spawned_child()",
        XLLM_PLATFORM="xllm",
    )
    parent, child = witness_lines(done)
    for seen in (parent, child):
        assert seen["platform"].startswith("vllm.platforms.")
        assert set(seen["ours"]) <= NATIVE_MODULES
        assert seen["argv"] == ["vllm", "serve", "m"]
        assert seen["exported"] == {
            "XLLM_PLATFORM": "native",
            "XLLM_PLATFORM_REASON": "native: --platform native",
        }
    assert child["platform"] == parent["platform"]


@needs_vllm
@pytest.mark.engine
def test_under_native_another_vendor_s_platform_wins(run_python: Any, site: Any) -> None:
    add_rival(site)
    site.add_module("witness", WITNESS)
    done = run_python("-c", "import witness; witness.show()", XLLM_PLATFORM="native")
    (seen,) = witness_lines(done)
    assert seen["platform"] == "rival_platform.RivalPlatform"
    assert set(seen["ours"]) <= NATIVE_MODULES


@needs_vllm
@pytest.mark.engine
def test_a_user_s_own_program_gets_an_exception_and_no_silent_stock_vllm(run_python: Any) -> None:
    done = run_python(
        "-c",
        "from xllm_plugin.errors import PlatformError\n"
        "try:\n    from vllm import LLM\n"
        "except PlatformError as error:\n    print('caught', error)\n",
        XLLM_PLATFORM="cuda",
    )
    assert done.returncode == 0, done.stderr
    assert "caught XLLM_PLATFORM: unknown platform 'cuda'" in done.stdout


@needs_vllm
@pytest.mark.engine
def test_vllm_s_own_command_ends_with_one_line(run_python: Any) -> None:
    vllm = shutil.which("vllm", path=str(Path(sys.executable).parent))
    assert vllm is not None
    done = run_python(vllm, "serve", "m", "--platform", "cuda")
    assert (done.returncode, done.stdout.strip()) == (2, "")
    ours = [line for line in done.stderr.splitlines() if line.startswith("xllm: ")]
    assert len(ours) == 1
    assert "--platform: unknown platform 'cuda'" in ours[0]
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize(
    ("environment", "words"),
    [
        ({"XLLM_PLATFORM": "cuda"}, "unknown platform 'cuda'"),
        ({"XLLM_DEVICE": "abacus"}, "no such device family"),
        ({"XLLM_LOAD_PLUGINS": "none-such"}, "no plugin named 'none-such'"),
    ],
)
def test_a_mistake_ends_a_command_with_one_message_and_exit_code_2(
    run_python: Any, environment: dict[str, str], words: str
) -> None:
    done = ask(run_python, COMMAND, **environment)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("xllm: ")
    assert done.stderr.count("\n") == 1
    assert words in done.stderr


def test_a_vllm_of_another_version(run_python: Any, site: Any) -> None:
    site.add_distribution("vllm", "0.31.0")
    done = ask(run_python, COMMAND)
    assert (done.returncode, done.stderr.count("\n")) == (2, 1)
    assert "vLLM 0.31.0 is installed; this version of xllm-plugin supports 0.32.x" in done.stderr
    native = ask(run_python, [*COMMAND, "--platform", "native"])
    assert (native.returncode, native.stdout) == (0, "None\n"), native.stderr


def test_a_second_out_of_tree_platform(run_python: Any, site: Any) -> None:
    add_rival(site)
    done = ask(run_python, COMMAND)
    assert (done.returncode, done.stderr.count("\n")) == (2, 1)
    assert "'rival' would be active beside 'xllm'" in done.stderr
    assert "--platform native for 'rival'" in done.stderr


def test_in_a_program_of_the_user_s_own_the_constructor_raises(run_python: Any) -> None:
    refused = "(platform(), __import__('xllm_plugin.entrypoints').entrypoints.RefusedPlatform())"
    done = ask(run_python, ["train.py"], what=refused, XLLM_DEVICE="abacus")
    assert done.returncode == 1
    assert "PlatformError: XLLM_DEVICE=abacus: no such device family" in done.stderr
    path = ask(run_python, ["train.py"], XLLM_DEVICE="abacus")
    assert path.stdout == "xllm_plugin.entrypoints.RefusedPlatform\n"


def test_a_traceback_can_be_asked_for_in_a_command_too(run_python: Any) -> None:
    done = ask(run_python, COMMAND, XLLM_DEVICE="abacus", XLLM_TRACEBACK="1")
    assert (done.returncode, done.stdout) == (0, "xllm_plugin.entrypoints.RefusedPlatform\n")


def test_an_unforeseen_error_does_not_start_stock_vllm_either(run_python: Any, site: Any) -> None:
    site.add_module(
        "shaky",
        """
        from xllm_plugin.hookspecs import hookimpl

        @hookimpl
        def register_device_families(register):
            raise ZeroDivisionError("driver version 0")
        """,
    )
    site.add_distribution("shaky-dist", entry_points={"xllm_plugin": {"shaky": "shaky"}})
    done = ask(run_python, COMMAND)
    assert done.returncode == 70
    assert "choosing the platform failed: ZeroDivisionError: driver version 0" in done.stderr
    assert "--platform native" in done.stderr
    assert ask(run_python, [*COMMAND, "--platform=native"]).stdout == "None\n"


@needs_vllm
@pytest.mark.parametrize(
    ("argv", "is_collecting"),
    [
        (COMMAND, "False"),
        (["vllm", "bench", "latency"], "True"),
        ([*COMMAND, "--platform", "native"], "True"),
    ],
)
def test_a_server_s_imports_are_not_interrupted(
    run_python: Any, argv: list[str], is_collecting: str
) -> None:
    what = "platform() and 0, __import__('gc').isenabled()"
    done = ask(run_python, argv, what=what)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split()[-1] == is_collecting


@needs_vllm
@pytest.mark.parametrize(
    ("argv", "is_prepared"), [(COMMAND, True), (["vllm", "bench", "latency"], False)]
)
def test_a_server_s_device_family_prepares(
    run_python: Any, site: Any, argv: list[str], is_prepared: bool
) -> None:
    site.add_module(
        "swift",
        """
        from xllm_plugin.accelerator.family import DeviceFamily, Probe
        from xllm_plugin.hookspecs import hookimpl

        @hookimpl
        def register_device_families(register):
            probe = Probe(True, "a toy", "a toy")
            prepare = lambda: print("prepared")
            register(DeviceFamily("swift", 9, "toy.Platform", lambda: probe, prepare=prepare))
        """,
    )
    site.add_distribution("swift-dist", entry_points={"xllm_plugin": {"swift": "swift"}})
    done = ask(run_python, argv)
    assert done.stdout.splitlines() == ["prepared"] * is_prepared + ["toy.Platform"], done.stderr


def test_endpoints_and_seams_under_native(run_python: Any) -> None:
    """Neither adds nor imports anything, and both can be called without a platform before them."""
    done = run_python(
        "-c",
        "import asyncio, sys; from xllm_plugin.entrypoints import endpoints, register\n"
        "register(); plugin = endpoints(); plugin.attach_router(None)\n"
        "asyncio.run(plugin.init_state(None, None, None))\n"
        "print(plugin.name, plugin.required_tasks)\n"
        "print(*sorted(n for n in sys.modules if n.partition('.')[0] in {'xllm_plugin', 'vllm'}))",
        XLLM_PLATFORM="native",
    )
    assert done.returncode == 0, done.stderr
    first, modules = done.stdout.splitlines()
    assert first == "xllm None"
    assert set(modules.split()) <= NATIVE_MODULES


def test_what_was_chosen_and_why_is_logged_once(run_python: Any) -> None:
    what = "(__import__('logging').basicConfig(level=20), platform(), platform())"
    done = ask(run_python, [*COMMAND, "--platform", "native"], what=what)
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("xllm-plugin: platform native (--platform native)") == 1


def test_a_variable_that_keeps_vllm_from_asking_us_is_named(run_python: Any) -> None:
    """VLLM_TARGET_DEVICE=cpu makes vLLM skip every platform plugin; general plugins still run."""
    code = "from vllm.plugins import load_general_plugins; load_general_plugins()"
    done = run_python("-c", code, VLLM_TARGET_DEVICE="cpu")
    assert done.returncode == 1
    assert "xllm is wanted, but vLLM runs on CpuPlatform: VLLM_TARGET_DEVICE=cpu" in done.stderr
    assert "XLLM_PLATFORM=native" in done.stderr
