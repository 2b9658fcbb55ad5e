"""The body of `GET /xllm/chat_template`: what the service needs to render chats as a server does.

It imports neither torch nor vLLM, so that the service can share it.
"""

from __future__ import annotations

from typing import Any, Literal

import msgspec

__all__ = ["CHAT_FORM_PATH", "ChatForm", "TemplateForm"]

CHAT_FORM_PATH = "/xllm/chat_template"


class TemplateForm(msgspec.Struct, frozen=True, kw_only=True):
    """A template as vLLM has resolved it.

    Attributes:
        source: Jinja.
        content_format: how it takes the content of messages: as a string, or as OpenAI's parts.
    """

    source: str
    content_format: Literal["string", "openai"]


class ChatForm(msgspec.Struct, frozen=True, kw_only=True):
    """How a server turns chats into text.

    Attributes:
        plain: for requests without tools.
        with_tools: for those with; often the same.
        special_tokens: what templates know them by (`bos_token`) -> their text.
        default_kwargs: `--default-chat-template-kwargs`.
    """

    plain: TemplateForm
    with_tools: TemplateForm
    special_tokens: dict[str, str]
    default_kwargs: dict[str, Any] = {}
