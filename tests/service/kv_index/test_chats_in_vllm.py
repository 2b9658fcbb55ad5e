"""Chats rendered here and by vLLM itself, with templates of real models: one text, or an error."""

from __future__ import annotations

import importlib
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import msgspec
import pytest
import tokenizers
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from starlette.datastructures import State

from xllm_plugin import shims
from xllm_plugin.instance.rendering import chat_form
from xllm_plugin.models import prepare
from xllm_plugin.service.kv_index.chats import CannotRenderError, ChatRenderer
from xllm_plugin.service.kv_index.samples import CHATS

# Imports vLLM, some seconds.  Templates warn of nothing that matters here.
pytestmark = [pytest.mark.engine, pytest.mark.filterwarnings("default")]

DEFAULTS = {"default_of_server": "yes", "enable_thinking": True}
MISTRALS = ("v1", "v2", "v3", "v7", "v11", "v13")
TRIMS = """{% for m in messages %}<{{ m.role }}>{{ m.content | trim }}{% endfor %}"""
DEVELOPERS = """{% for m in messages %}{{ m.role == 'developer' }}{{ m }}{% endfor %}"""


@pytest.fixture(scope="module", autouse=True)
def _vllm() -> None:
    shims.install()
    pytest.importorskip("vllm.renderers.hf", reason="no vLLM to compare with")


def installed_templates() -> Iterator[tuple[str, Callable[[], str]]]:
    """Of vLLM, transformers and mistral_common as installed: names, and how to read them."""
    for name in (
        "basic",
        "blip2",
        "chatml",
        "deepseek_ocr",
        "deepseek_vl2",
        "kimi_audio",
        "minicpmv45",
    ):
        yield f"vllm {name}", lambda name=name: vllm_template(name)  # type: ignore[misc]
    constants = {
        "muse_glimmer": ("vllm.transformers_utils.processors.muse_glimmer", "CHAT_TEMPLATE"),
        "smolvlm": ("transformers.models.smolvlm.processing_smolvlm", "DEFAULT_CHAT_TEMPLATE"),
    }
    for name, (module, constant) in constants.items():
        yield name, lambda module=module, constant=constant: constant_of(module, constant)  # type: ignore[misc]
    for version in MISTRALS:
        yield f"mistral {version}", lambda version=version: mistral_template(version)  # type: ignore[misc]
    yield "smollm2", smollm2_template
    yield "one that trims", lambda: TRIMS
    yield "one that knows developers", lambda: DEVELOPERS


def vllm_template(name: str) -> str:
    folder = importlib.import_module("vllm.transformers_utils.chat_templates.registry")
    path: Path = folder.CHAT_TEMPLATES_DIR / f"template_{name}.jinja"
    if not path.exists():
        pytest.skip(f"this vLLM brings no template {name}")
    return path.read_text(encoding="utf-8")


def constant_of(module: str, name: str) -> str:
    found = [
        value
        for key, value in vars(importlib.import_module(module)).items()
        if key.endswith(name) and isinstance(value, str)
    ]
    if not found:
        pytest.skip(f"{module} brings no template")
    return found[0]


def mistral_template(version: str) -> str:
    made = pytest.importorskip("mistral_common.integrations.chat_templates.chat_templates")
    versions = importlib.import_module("mistral_common.tokens.tokenizers.base").TokenizerVersion
    source: str = made.generate_chat_template(
        spm=version in ("v1", "v2"),
        tokenizer_version=versions[version],
        image_support=False,
        audio_support=False,
        thinking_support=version == "v13",
        default_system_prompt=None,
        plain_thinking_support=False,
        use_special_token_variables=True,
        model_settings_fields=None,
        reasoning_effort_values=None,
        reasoning_effort_default=None,
    )
    return source


def smollm2_template() -> str:
    config = json.loads((prepare("smollm2") / "tokenizer_config.json").read_text(encoding="utf-8"))
    source: str = config["chat_template"]
    return source


TEMPLATES = dict(installed_templates())


class InVllm:
    """A server's renderer around a template, without its engine."""

    def __init__(self, source: str) -> None:
        from transformers import PreTrainedTokenizerFast
        from vllm.renderers.hf import HfRenderer

        model = tokenizers.models.WordLevel({"<unk>": 0, "<s>": 1, "</s>": 2}, unk_token="<unk>")
        self.tokenizer = PreTrainedTokenizerFast(
            tokenizer_object=tokenizers.Tokenizer(model), bos_token="<s>", eos_token="</s>"
        )
        config = SimpleNamespace(
            enable_prompt_embeds=False,
            multimodal_config=None,
            hf_config=SimpleNamespace(model_type="llama"),
            **dict.fromkeys(("revision", "code_revision", "tokenizer_revision")),
            **dict.fromkeys(("model", "tokenizer"), "m"),
            trust_remote_code=False,
        )
        self.renderer = HfRenderer.__new__(HfRenderer)
        self.renderer.tokenizer, self.renderer.model_config = self.tokenizer, config
        self.renderer.use_unified_vision_chunk = False
        self.source = source

    def state(self, **fields: Any) -> State:
        """The API server's, as far as rendering goes."""
        serving = SimpleNamespace(
            renderer=self.renderer,
            online_renderer=SimpleNamespace(use_harmony=False),
            model_config=self.renderer.model_config,
            chat_template=self.source,
            chat_template_content_format="auto",
            default_chat_template_kwargs=DEFAULTS,
        )
        vars(serving).update(fields)
        return State({"serving_tokenization": serving})

    def text(self, question: bytes) -> str | None:
        """As `/tokenize` renders; None if it refuses."""
        from vllm.entrypoints.serve.tokenize.protocol import TokenizeChatRequest
        from vllm.renderers import merge_kwargs

        try:
            request = TokenizeChatRequest.model_validate(json.loads(question))
            tools = None if request.tools is None else [one.model_dump() for one in request.tools]
            params = request.build_chat_params(self.source, "auto").with_defaults(
                merge_kwargs(DEFAULTS, {"tools": tools, "tokenize": False})
            )
            _, prompt = self.renderer.render_messages(request.messages, params)
        except Exception:  # noqa: BLE001 - whatever it is, its client gets an error
            return None
        found: str = prompt["prompt"]
        return found


class Pair:
    """Both ways of one template."""

    def __init__(self, source: str) -> None:
        self.vllm = InVllm(source)
        form = chat_form(self.vllm.state())
        assert form is not None
        self.here = ChatRenderer.read(msgspec.json.encode(form))

    def check(self, chat: dict[str, Any]) -> bool:
        """Whether it is text; the same for both, or an error for both."""
        question = json.dumps({"model": "m", **chat}).encode()
        expected = self.vllm.text(question)
        try:
            found = self.here.render(question).text
        except CannotRenderError:
            found = None
        assert found == expected
        return found is not None


@pytest.fixture(scope="module", params=TEMPLATES)
def pair(request: pytest.FixtureRequest) -> Pair:
    return Pair(TEMPLATES[request.param]())


def test_samples_come_out_the_same(pair: Pair) -> None:
    assert sum([pair.check(chat) for chat in CHATS]) >= 1


TEXT = st.one_of(
    st.sampled_from(
        [
            "",
            " ",
            "a",
            " b \n",
            "<|im_end|>",
            "{{ x }}",
            "</s>",
            "é🐉",
            "[INST]",
            "<think>\nw\n</think>\nx",
        ]
    ),
    st.text(st.characters(exclude_categories=["Cs"]), max_size=8),
)
PARTS = st.lists(st.fixed_dictionaries({"type": st.just("text"), "text": TEXT}), max_size=3)
JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-9, 9) | st.floats(allow_nan=False) | TEXT,
    lambda inner: st.lists(inner, max_size=2) | st.dictionaries(TEXT, inner, max_size=2),
    max_leaves=4,
)
CALLS = st.lists(
    st.fixed_dictionaries(
        {
            "id": st.sampled_from(["call12345", "call67890", "c"]),
            "type": st.just("function"),
            "function": st.fixed_dictionaries(
                {
                    "name": st.sampled_from(["f", "g h"]),
                    "arguments": st.one_of(TEXT, JSON.map(json.dumps)),
                }
            ),
        }
    ),
    max_size=2,
)
MESSAGE = st.one_of(
    st.fixed_dictionaries(
        {
            "role": st.sampled_from(["user", "system", "developer", "critic"]),
            "content": TEXT | PARTS,
        },
        optional={"name": TEXT, "refusal": st.none()},
    ),
    st.fixed_dictionaries(
        {"role": st.just("assistant"), "content": st.none() | TEXT | PARTS},
        optional={"tool_calls": CALLS, "refusal": st.none(), "reasoning": st.none()},
    ),
    st.fixed_dictionaries(
        {
            "role": st.just("tool"),
            "content": TEXT | PARTS,
            "tool_call_id": st.sampled_from(["call12345", "call67890"]),
        }
    ),
)
TOOLS = st.lists(
    st.fixed_dictionaries(
        {
            "type": st.just("function"),
            "function": st.fixed_dictionaries(
                {"name": TEXT},
                optional={
                    "description": st.none() | TEXT,
                    "parameters": st.none() | st.dictionaries(TEXT, JSON, max_size=2),
                    "strict": st.none() | st.booleans(),
                },
            ),
        }
    ),
    min_size=1,
    max_size=2,
)
FLAGS = st.sampled_from(
    [
        {},
        {"add_generation_prompt": False},
        {"add_generation_prompt": False, "continue_final_message": True},
        {"continue_final_message": True},
    ]
)
VARIABLES = st.dictionaries(
    st.sampled_from(["enable_thinking", "bos_token", "default_of_server", "unknown"]),
    st.sampled_from([None, "auto", True, False, "x"]),
    max_size=2,
)


@st.composite
def dialogues(draw: st.DrawFn) -> dict[str, Any]:
    if draw(st.booleans()):  # as most templates want them
        turns = draw(st.lists(TEXT | PARTS, min_size=1, max_size=4))
        roles = ("user", "assistant", "user", "assistant")
        messages: list[Any] = [
            {"role": role, "content": content} for role, content in zip(roles, turns, strict=False)
        ]
    else:
        messages = draw(st.lists(MESSAGE, min_size=1, max_size=5))
    found: dict[str, Any] = {"messages": messages, **draw(FLAGS)}
    if draw(st.booleans()):
        found["tools"] = draw(TOOLS)
    if variables := draw(VARIABLES):
        found["chat_template_kwargs"] = variables
    return found


@settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))
@given(chat=dialogues())
def test_any_chat_comes_out_the_same(pair: Pair, chat: dict[str, Any]) -> None:
    pair.check(chat)


def test_what_is_more_than_a_template_is_not_handed_out() -> None:
    from vllm.renderers.hf import HfRenderer

    class Other(HfRenderer):  # type: ignore[misc]
        pass

    server = InVllm("{{ messages[0].content }}")
    assert chat_form(server.state()) is not None
    other = Other.__new__(Other)
    vars(other).update(vars(server.renderer))
    assert chat_form(server.state(renderer=other)) is None
    assert chat_form(server.state(online_renderer=SimpleNamespace(use_harmony=True))) is None
    embeds = SimpleNamespace(**{**vars(server.renderer.model_config), "enable_prompt_embeds": True})
    assert chat_form(server.state(model_config=embeds)) is None
    assert chat_form(server.state(chat_template=None)) is None, "none, and none of the tokenizer's"


def test_requests_with_tools_may_have_a_template_of_their_own() -> None:
    server = InVllm("")
    server.tokenizer.chat_template = {
        "default": "{{ messages }}",
        "tool_use": "{% for m in messages %}{% for p in m.content %}{% endfor %}{% endfor %}",
    }
    form = chat_form(server.state(chat_template=None))
    assert form is not None
    assert (form.plain.source, form.plain.content_format) == ("{{ messages }}", "string")
    assert form.with_tools.content_format == "openai"
    assert form.special_tokens == {"bos_token": "<s>", "eos_token": "</s>"}
    assert form.default_kwargs == DEFAULTS
