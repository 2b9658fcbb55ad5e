"""The runner mixin: every device family's model runner is this over vLLM's own."""

from __future__ import annotations

from typing import Any

from xllm_plugin.errors import InternalError, SeamError
from xllm_plugin.worker.resumed import resumed_tokens, take_up

__all__ = ["XllmModelRunnerMixin", "adopt_runner"]


class XllmModelRunnerMixin:
    """Stands before vLLM's model runner in the bases; later parts hook their work in here.

    `CPUWorker.init_device` builds vLLM's runner by name, so the class is put on afterwards
    (`adopt_runner`) and `__init__` of this class never runs: state belongs into `setup_xllm`.
    """

    def setup_xllm(self) -> None:
        """Prepare this mixin's state; called once, after vLLM built and before it loads."""

    def _update_states(self, scheduler_output: Any) -> Any:
        """Let vLLM update its batch, then give requests the output that they came with.

        They come with a stream that another instance has begun (seam "resumed-batch").
        """
        deferred = super()._update_states(scheduler_output)  # type: ignore[misc]
        resumed = {
            new.req_id: tokens
            for new in scheduler_output.scheduled_new_reqs
            if (tokens := resumed_tokens(new.sampling_params))
        }
        if resumed:
            take_up(self, resumed, scheduler_output.scheduled_spec_decode_tokens)
            for req_id, tokens in resumed.items():
                self.skip_draws(req_id, len(tokens))
        return deferred

    def skip_draws(self, req_id: str, num_tokens: int) -> None:
        """Draw from a seeded request's generator what its first tokens took.

        What that is depends on a family's sampler.  The platform of one that has this says so
        (`xllm_skips_draws`); else no stream with a seed gets here (`instance/replay.py`).

        Raises:
            InternalError: one has got here.
        """
        if self.requests[req_id].generator is not None:  # type: ignore[attr-defined]
            raise InternalError(
                f"request {req_id} has a seed and comes with {num_tokens} tokens, and "
                f"{type(self).__qualname__} does not know what these have drawn"
            )


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
