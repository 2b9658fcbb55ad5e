"""Chats to text as vLLM 0.32 does it: its own preparation of messages, then the model's template.

Only what is certain to come out the same: text, tool calls and tools in OpenAI's form.  All else
(images, reasoning, templates that a request brings, fields that are not known here) raises
`CannotRenderError` and stays the instance's.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping
from typing import Any, Final, NamedTuple, Self

import msgspec

from xllm_plugin.instance.chat_form import ChatForm, TemplateForm
from xllm_plugin.service.kv_index.templates import (
    HELPERS,
    CannotRenderError,
    ChatTemplate,
    TookTooLongError,
)

__all__ = ["CannotRenderError", "ChatRenderer", "Rendered"]

logger = logging.getLogger(__name__)

_MOST_QUESTION_BYTES: Final = 2**18
_MOST_MESSAGES: Final = 1000
"""Within both a usual template takes a part of its time; one that takes longer is to blame."""
_FIELDS: Final = frozenset(
    {
        *("model", "messages", "tools", "add_generation_prompt", "continue_final_message"),
        *("add_special_tokens", "chat_template_kwargs"),
    }
)
_MESSAGE_FIELDS: Final = frozenset({"role", "content", "name", "tool_calls", "tool_call_id"})
_OWNERS: Final = {"tool_calls": "assistant", "tool_call_id": "tool"}
_TOOL_FIELDS: Final[Mapping[Any, type]] = {"description": str, "parameters": dict, "strict": bool}
_NOT_VARIABLES: Final = HELPERS.keys() | {
    *("self", "conversation", "conversations", "messages", "tools", "chat_template", "tokenize"),
    *("add_generation_prompt", "continue_final_message", "padding", "truncation", "max_length"),
    *("return_tensors", "return_dict", "return_assistant_tokens_mask", "tokenizer_kwargs"),
}
"""Parameters of `apply_chat_template`: as template variables they would mean something else."""
_IGNORED_VALUES: Final = (None, "auto")
"""Of a request's variables; the server's defaults stand then."""
_MARK: Final = "CONTINUE_FINAL_MESSAGE_TAG "
"""Ends the last message where the template must not; the same word as there, since templates see
it.  Its last character tells whether the template strips messages."""
_DROPPED_FROM_SYSTEM: Final = "x-anthropic-billing-header"
"""vLLM takes this line off, and what counts as a line is its own affair."""

_decode_form = msgspec.json.Decoder(ChatForm).decode


class Rendered(NamedTuple):
    """What is left to tokenise."""

    text: str
    add_special_tokens: bool


class _Side:
    """One of a model's two templates."""

    def __init__(self, form: TemplateForm) -> None:
        self.template = ChatTemplate(form.source)
        self.takes_parts = form.content_format == "openai"
        quoted = (f"{quote}developer{quote}" for quote in ("'", '"'))
        self.knows_developers = any(word in form.source for word in quoted)


class ChatRenderer:
    """Renders the chats of one model.  Threads may share it.

    Raises:
        CannotRenderError: a template is none, or the server's defaults are no template variables.
    """

    def __init__(self, form: ChatForm) -> None:
        if unclear := form.default_kwargs.keys() & _NOT_VARIABLES:
            raise CannotRenderError(f"the server's default {', '.join(sorted(unclear))}")
        self._plain = _Side(form.plain)
        same = form.with_tools == form.plain
        self._with_tools = self._plain if same else _Side(form.with_tools)
        self._special_tokens = form.special_tokens
        self._defaults = form.default_kwargs
        self._most_bytes = _MOST_QUESTION_BYTES
        """Of a question; half of one that took too long."""

    @classmethod
    def read(cls, body: bytes) -> Self:
        """From what an instance hands out.

        Raises:
            CannotRenderError: as the class, or it is no such body.
        """
        try:
            return cls(_decode_form(body))
        except msgspec.DecodeError as error:
            raise CannotRenderError(
                f"no chat template as instances hand it out: {error}"
            ) from error

    def render(self, question: bytes) -> Rendered:
        """The text of a chat.

        Args:
            question: the body of a request to `/tokenize`.

        Raises:
            CannotRenderError: the instance has to be asked.
        """
        if len(question) > self._most_bytes:
            raise CannotRenderError("too long")
        try:
            asked = json.loads(question)  # not msgspec: what is odd shall be odd as it is there
            return self._render(asked)
        except CannotRenderError:
            raise
        except TookTooLongError as error:
            self._most_bytes = min(self._most_bytes, len(question) // 2)
            logger.warning(
                "a chat of %d bytes for %r took its template too long; with this template, those "
                "of over %d are left to instances until none that has it is known",
                len(question),
                asked.get("model"),
                self._most_bytes,
            )
            raise CannotRenderError("too long") from error
        except (RecursionError, ValueError) as error:
            raise CannotRenderError(f"no question: {error}") from error
        except Exception as error:  # templates are programs, and questions are a client's
            logger.debug("a chat failed in a way that is not known here", exc_info=True)
            raise CannotRenderError(f"{type(error).__name__}: {error}") from error

    def _render(self, asked: Any) -> Rendered:
        if not isinstance(asked, dict) or (asked.keys() - _FIELDS):
            raise CannotRenderError("fields that are not known here")
        tools = _tools(asked.get("tools"))
        side = self._plain if tools is None else self._with_tools
        messages = _messages(asked.get("messages"), side)
        generates = _flag(asked, "add_generation_prompt", default=True)
        variables = self._variables(asked.get("chat_template_kwargs"), side.template)
        variables |= {
            "messages": messages,
            "tools": tools,
            "add_generation_prompt": generates,
        }
        if _flag(asked, "continue_final_message", default=False):
            if generates:
                raise CannotRenderError("a message that goes on, and a new one")
            text = _open_ended(side.template, variables, messages[-1])
        else:
            text = side.template.render(variables)
        text.encode()  # UnicodeEncodeError: half a character, which no tokenizer takes
        return Rendered(text, _flag(asked, "add_special_tokens", default=False))

    def _variables(self, given: Any, template: ChatTemplate) -> dict[str, Any]:
        if not isinstance(given, dict | None) or (given and given.keys() & _NOT_VARIABLES):
            raise CannotRenderError("chat_template_kwargs that are no variables")
        said = {
            name: value for name, value in (given or {}).items() if value not in _IGNORED_VALUES
        }
        chosen = self._defaults | said
        documents = chosen.pop("documents", None)
        if documents is not None and not (
            isinstance(documents, list) and all(isinstance(one, dict) for one in documents)
        ):
            raise CannotRenderError("documents that are no list of objects")
        seen = {name: value for name, value in chosen.items() if name in template.variables}
        return self._special_tokens | seen | {"documents": documents}


def _flag(asked: dict[str, Any], name: str, *, default: bool) -> bool:
    value = asked.get(name, default)
    if not isinstance(value, bool):
        raise CannotRenderError(f"{name} is no boolean")
    return value


def _messages(given: Any, side: _Side) -> list[dict[str, Any]]:
    if not isinstance(given, list) or not given:
        raise CannotRenderError("no messages")
    if len(given) > _MOST_MESSAGES:
        raise CannotRenderError("too many messages")
    found = [_message(one, takes_parts=side.takes_parts) for one in given]
    if not side.knows_developers and any(one["role"] == "developer" for one in found):
        return _without_developers(found)
    return found


def _without_developers(messages: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """What developers say is said by the system, and that at once at the start."""
    for one in messages:
        if one["role"] == "developer":
            one["role"] = "system"
            del one["tools"]
    if all(one["role"] != "system" for one in messages[1:]):
        return messages
    texts = [_joined(one["content"]) for one in messages if one["role"] == "system"]
    system = {"role": "system", "content": "\n\n".join(filter(None, texts))}
    return [system, *(one for one in messages if one["role"] != "system")]


def _joined(content: Any) -> str:
    if isinstance(content, str):
        return content
    return "\n".join(part["text"] for part in content)


def _message(given: Any, *, takes_parts: bool) -> dict[str, Any]:
    """What the template sees of a message, in vLLM's order."""
    if not isinstance(given, dict):
        raise CannotRenderError("a message that is no object")
    said = {
        name: value
        for name, value in given.items()
        if value is not None or name == "tool_call_id"  # whose null a template would see
    }
    role = said.get("role")
    if not isinstance(role, str) or said.keys() - _MESSAGE_FIELDS:
        raise CannotRenderError("a message with more than is known here")
    if any(role != owner for name, owner in _OWNERS.items() if name in said):
        raise CannotRenderError(f"a tool call of {role}")
    texts = _texts(said.get("content", [] if role == "assistant" else None))
    if role == "system" and any(text.startswith(_DROPPED_FROM_SYSTEM) for text in texts):
        raise CannotRenderError("a header in a system message")
    found: dict[str, Any] = {"role": role, "content": _content(texts, role, takes_parts)}
    calls = said.get("tool_calls", [])
    if not isinstance(calls, list):
        raise CannotRenderError("tool_calls that are no list")
    if calls:
        found["tool_calls"] = [_tool_call(call) for call in calls]
    for name in ("tool_call_id", "name"):
        if name in said:
            found[name] = _string(said[name])
    if role == "developer":
        found["tools"] = None
    return found


def _texts(content: Any) -> list[str]:
    if isinstance(content, str):
        return [content]
    if not isinstance(content, list):
        raise CannotRenderError("content that is no text")
    for part in content:
        if not isinstance(part, dict) or part.keys() != {"type", "text"} or part["type"] != "text":
            raise CannotRenderError("content that is no text")
    return [_string(part["text"]) for part in content]


def _content(texts: list[str], role: str, takes_parts: bool) -> Any:
    if not takes_parts:
        return "\n".join(filter(None, texts))
    if role == "tool":  # what most templates expect
        return "\n".join(texts)
    return [{"type": "text", "text": text} for text in texts]


def _tool_call(given: Any) -> dict[str, Any]:
    match given:
        case {
            "id": str(call_id),
            "type": "function",
            "function": {"name": str(name), "arguments": str(arguments), **others},
            **more,
        } if not (others or more):
            function = {"arguments": _arguments(arguments), "name": name}
            return {"id": call_id, "function": function, "type": "function"}
    raise CannotRenderError("a tool call in a form that is not known here")


def _arguments(text: str) -> dict[str, Any]:
    """Templates take an object; what is none becomes an empty one."""
    try:
        found = json.loads(text) if text else {}
    except json.JSONDecodeError:
        return {}
    return found if isinstance(found, dict) else {}


def _tools(given: Any) -> list[dict[str, Any]] | None:
    if given is None:
        return None
    if not isinstance(given, list) or not given:
        raise CannotRenderError("tools that are no list")
    return [_tool(one) for one in given]


def _tool(given: Any) -> dict[str, Any]:
    match given:
        case {"type": "function", "function": {"name": str(name), **others}, **more} if not more:
            for field, value in others.items():
                if value is not None and not isinstance(value, _TOOL_FIELDS.get(field, type(None))):
                    raise CannotRenderError(f"a tool's {field}")
            found = {field: others.get(field) for field in ("description", "parameters")}
            strict = {} if others.get("strict") is None else {"strict": others["strict"]}
            return {"type": "function", "function": {"name": name, **found, **strict}}
    raise CannotRenderError("a tool in a form that is not known here")


def _string(value: Any) -> str:
    if not isinstance(value, str):
        raise CannotRenderError("no text where one is expected")
    return value


def _open_ended(template: ChatTemplate, variables: dict[str, Any], last: dict[str, Any]) -> str:
    """The text up to the end of the last message's content."""
    content = last["content"]
    if "content" not in template.source or content == []:
        raise CannotRenderError("no last message that could go on")
    if isinstance(content, str):
        ending = content
        last["content"] = content + _MARK
    else:
        ending = content[-1]["text"]
        content[-1]["text"] = ending + _MARK
    text, mark = template.render(variables), _MARK.strip()
    if ending.strip() not in text or mark not in text:
        raise CannotRenderError("the template drops the end of the last message")
    end = text.rindex(mark)
    return text[:end] if text.startswith(_MARK, end) else text[:end].rstrip()
