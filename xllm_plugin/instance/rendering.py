"""How this server renders chats, for `GET /xllm/chat_template`.

What vLLM has resolved is handed out, and not the options that led to it: which template is in force
depends on the command line, the model's folder and tables of vLLM's own.
"""

from __future__ import annotations

from typing import Any

from starlette.datastructures import State

from xllm_plugin.instance.chat_form import ChatForm, TemplateForm

__all__ = ["chat_form"]


def chat_form(state: State) -> ChatForm | None:
    """What renders this server's chats; None if that is more than a template.

    Some families are rendered by code of vLLM's (Mistral, DeepSeek V3.2, gpt-oss, ...), and prompt
    embeddings put more than text into a chat.

    Args:
        state: of vLLM's API server.
    """
    serving = getattr(state, "serving_tokenization", None)
    if serving is None:
        return None
    from vllm.renderers.hf import HfRenderer

    if type(serving.renderer) is not HfRenderer:  # one that derives from it does more
        return None
    if serving.online_renderer.use_harmony or serving.model_config.enable_prompt_embeds:
        return None
    plain, with_tools = _template(serving, None), _template(serving, [])
    if plain is None or with_tools is None:
        return None
    return ChatForm(
        plain=plain,
        with_tools=with_tools,
        special_tokens=dict(serving.renderer.get_tokenizer().special_tokens_map),
        default_kwargs=serving.default_chat_template_kwargs,
    )


def _template(serving: Any, tools: list[dict[str, Any]] | None) -> TemplateForm | None:
    """The template for requests with tools, or without: only whether there are any counts."""
    from vllm.renderers.hf import resolve_chat_template, resolve_chat_template_content_format

    tokenizer, model_config = serving.renderer.get_tokenizer(), serving.model_config
    source = resolve_chat_template(
        tokenizer, serving.chat_template, tools, model_config=model_config
    )
    if source is None:
        return None
    content_format = resolve_chat_template_content_format(
        serving.chat_template,
        tools,
        serving.chat_template_content_format,
        tokenizer,
        model_config=model_config,
    )
    return TemplateForm(source=source, content_format=content_format)
