"""Settings of the scheduler: ``--additional-config '{"xllm": {"scheduler": {...}}}'``."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

from xllm_plugin.scheduler.promise import MAX_TARGET_MS, TENANT_PATTERN, Promise, ServiceClass

__all__ = ["SchedulerConfig", "slo_refusal"]


class SchedulerConfig(BaseModel):
    """Which requests run in a step, and what they are promised if they do not say."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    policy: Literal["fcfs", "slo"] = "fcfs"
    """`fcfs`: vLLM's own order.  `slo`: planned by the slack that each request's promise leaves."""

    ttft_ms: float = Field(default=1000.0, gt=0, le=MAX_TARGET_MS)
    """Time to first token promised to a request that asks for none."""

    tpot_ms: float = Field(default=50.0, gt=0, le=MAX_TARGET_MS)
    """Time per output token promised to a request that asks for none."""

    service_class: ServiceClass = ServiceClass.ONLINE
    """Class of a request that names none: `online`, or `offline` for work nobody waits for."""

    tenant: str = Field(default="default", pattern=rf"^{TENANT_PATTERN}$")
    """Tenant of a request that names none."""

    target: float = Field(default=0.98, gt=0, le=1)
    """Steps are filled to this part of the time that the tightest promise leaves (the paper's
    figure for merged decode batches)."""

    max_wait_s: float = Field(default=30.0, gt=0)
    """An online request that has waited or been held so long is served before all others, late as
    it is.  Offline requests have no such bound while online ones need the device."""

    step_trace: Path | None = None
    """File that every step under `slo` is appended to, as one JSON object a line: what was in it,
    how long it was to take, and took.  Some 400 bytes a step."""

    @model_validator(mode="after")
    def _traces_what_is_planned(self) -> Self:
        if self.step_trace is not None and self.policy != "slo":
            raise ValueError(
                f"step_trace is {self.step_trace}, and policy is {self.policy}, which predicts "
                "nothing to trace; set policy to slo, or leave step_trace out"
            )
        return self

    @property
    def default_promise(self) -> Promise:
        """The promise of a request that says nothing."""
        return Promise(
            ttft_ms=self.ttft_ms,
            tpot_ms=self.tpot_ms,
            service_class=self.service_class,
            tenant=self.tenant,
        )


def slo_refusal(vllm_config: Any) -> str | None:
    """Why the policy `slo` cannot serve under this vLLM configuration, or None.

    Asynchronous scheduling, prefix caching, structured output, LoRA, multimodal inputs, speculative
    decoding and KV connectors are no reason.
    """
    scheduler, model = vllm_config.scheduler_config, vllm_config.model_config
    reasons = (
        (
            not scheduler.enable_chunked_prefill,
            "chunked prefill is off; a prompt has to fit the time that decodes leave",
        ),
        (
            scheduler.policy != "fcfs",
            f"--scheduling-policy is {scheduler.policy}; give priorities as xllm_priority",
        ),
        (
            vllm_config.parallel_config.pipeline_parallel_size > 1,
            "--pipeline-parallel-size is over 1; steps then overlap, and their times with them",
        ),
        (
            scheduler.disable_chunked_mm_input and model.is_multimodal_model,
            "--disable-chunked-mm-input is on; an image has to fit the time that decodes leave",
        ),
        (model.runner_type != "generate", "the model generates no tokens"),
    )
    return next((reason for is_met, reason in reasons if is_met), None)
