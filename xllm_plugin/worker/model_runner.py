"""The runner mixin: every device family's model runner is this over vLLM's own."""

from __future__ import annotations

from typing import Any

from xllm_plugin.errors import SeamError

__all__ = ["XllmModelRunnerMixin", "adopt_runner"]


class XllmModelRunnerMixin:
    """Stands before vLLM's model runner in the bases; later parts hook their work in here.

    `CPUWorker.init_device` builds vLLM's runner by name, so the class is put on afterwards
    (`adopt_runner`) and `__init__` of this class never runs: state belongs into `setup_xllm`.
    """

    def setup_xllm(self) -> None:
        """Prepare this mixin's state; called once, after vLLM built and before it loads."""


def adopt_runner(worker: Any, runner_class: type[XllmModelRunnerMixin]) -> None:
    """Make the worker's runner an instance of `runner_class` (seam "cpu-runner-class").

    Raises:
        SeamError: the runner is not of the class that `runner_class` extends.
    """
    runner = worker.model_runner
    if isinstance(runner, runner_class):
        return
    if type(runner) not in runner_class.__mro__:
        raise SeamError(
            f"seam 'cpu-runner-class': vLLM built a {type(runner).__module__}."
            f"{type(runner).__qualname__}, which {runner_class.__qualname__} does not extend. "
            "Install a supported vLLM, or run without this plugin: --platform native."
        )
    runner.__class__ = runner_class
    runner.setup_xllm()
