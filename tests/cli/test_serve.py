"""`xllm serve` is vLLM's own command, and its mistakes end in one message."""

from __future__ import annotations

import importlib.util
import os
import socket
import subprocess
import sys
import sysconfig
from pathlib import Path
from typing import Any

import pytest

import xllm_plugin

SERVE = ("-m", "xllm_plugin.cli", "serve")

# Stands for vLLM's command: resolves the platform as vLLM does, then shows what it was given.
VLLM_MAIN = """
    import importlib.metadata
    import sys

    def main():
        (entry,) = [
            e for e in importlib.metadata.entry_points(group="vllm.platform_plugins")
            if e.name == "xllm"
        ]
        print(entry.load()())
        print(*sys.argv)
"""


def add_vllm(site: Any, version: str, source: str = VLLM_MAIN) -> None:
    """Install a stand-in for vLLM that shadows the real one."""
    site.add_module("vllm.entrypoints.cli.main", source)
    site.add_distribution("vllm", version)


def test_every_argument_reaches_vllm_s_command(run_python: Any, site: Any) -> None:
    add_vllm(site, "0.32.0+cpu")
    done = run_python(*SERVE, "m", "--port", "1", "--help", "-x", "--", "y", XLLM_DEVICE="cpu")
    assert done.returncode == 0, done.stderr
    platform, argv = done.stdout.splitlines()[-2:]
    assert platform == "xllm_plugin.cpu.platform.XllmCpuPlatform"
    assert argv.startswith("vllm serve m --port 1 --help -x")
    assert argv.endswith("y")


@pytest.mark.parametrize("version", ["0.32.0+cpu", "0.31.0"])
def test_native_runs_any_vllm(run_python: Any, site: Any, version: str) -> None:
    add_vllm(site, version)
    done = run_python(*SERVE, "m", "--platform", "native")
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-2:] == ["None", "vllm serve m"]


def test_a_vllm_of_another_version(run_python: Any, site: Any) -> None:
    add_vllm(site, "0.31.0")
    done = run_python(*SERVE, "m")
    assert done.returncode == 2
    assert done.stderr.startswith("xllm: vLLM 0.31.0 is installed; this version of xllm-plugin")
    assert done.stderr.count("\n") == 1


@pytest.mark.parametrize(
    ("raised", "said"),
    [
        ("ImportError('libnuma.so.1: cannot open')", "libnuma.so.1: cannot open."),
        (
            "RuntimeError('torch_npu failed.') from ImportError('libhccl.so: cannot open')",
            "torch_npu failed. (libhccl.so: cannot open).",
        ),
    ],
)
def test_a_vllm_that_cannot_be_imported(run_python: Any, site: Any, raised: str, said: str) -> None:
    add_vllm(site, "0.32.0", f"raise {raised}")
    done = run_python(*SERVE, "m")
    assert done.returncode == 2
    assert done.stderr.startswith(f"xllm: vLLM 0.32.0 is installed but cannot be imported: {said}")
    assert "Traceback" not in done.stderr


def without_vllm(folder: Path) -> Path:
    """Make a site folder with everything that is installed here but vLLM."""
    folder.mkdir()
    for installed in Path(sysconfig.get_path("purelib")).iterdir():
        if not installed.name.startswith(("vllm", "xllm_plugin", "__pycache__")):
            (folder / installed.name).symlink_to(installed)
    package = Path(xllm_plugin.__file__).parent
    (folder / "xllm_plugin").symlink_to(package)
    return folder


@pytest.mark.parametrize(
    ("command", "exit_code", "words"),
    [
        ("serve m", 2, "xllm: vLLM is not installed here. Install it with this package: pip"),
        ("doctor", 1, "vLLM is not installed here"),
        ("--help", 0, "Serve a model over the OpenAI API"),
    ],
)
def test_without_vllm(tmp_path: Path, command: str, exit_code: int, words: str) -> None:
    done = subprocess.run(
        # -S: none of the site folders of this interpreter.
        [sys.executable, "-S", "-m", "xllm_plugin.cli", *command.split()],
        env={"PATH": os.environ["PATH"], "PYTHONPATH": str(without_vllm(tmp_path / "bare"))},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == exit_code, done.stderr
    assert words in (done.stdout + done.stderr).replace("\n", " ")
    assert "Traceback" not in done.stderr


needs_vllm = pytest.mark.skipif(
    importlib.util.find_spec("vllm") is None, reason="vLLM is not installed"
)


def last_line(done: Any) -> str:
    assert "Traceback" not in done.stderr
    last: str = done.stderr.strip().splitlines()[-1]
    return last


@needs_vllm
@pytest.mark.e2e
def test_a_model_that_is_not_there(run_python: Any) -> None:
    done = run_python(*SERVE, "no-such/model", "--port", "0", XLLM_DEVICE="cpu")
    assert done.returncode == 2
    assert last_line(done).startswith("xllm: model 'no-such/model': not a folder on this machine")


@needs_vllm
@pytest.mark.e2e
def test_a_port_in_use(run_python: Any) -> None:
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        port = str(other.getsockname()[1])
        done = run_python(*SERVE, "m", "--host", "127.0.0.1", "--port", port, XLLM_DEVICE="cpu")
    assert done.returncode == 1
    assert last_line(done).startswith(f"xllm: port {port} is in use by another program.")
