"""Chat templates, run as Hugging Face's tokenizers run them.

A template is a program out of a model's folder.  It gets Jinja's sandbox, without what would take
for ever in one operation, and a bound on its processor time that every turn of a loop, every call
and every filter looks at: threads cannot be ended from outside.  Its memory has no bound of its
own, nor has one operation on what a template has made large before.
"""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from datetime import datetime
from typing import Any, Final

import jinja2
from jinja2 import meta, nodes, pass_context
from jinja2.exceptions import SecurityError
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.runtime import Context
from jinja2.sandbox import ImmutableSandboxedEnvironment

__all__ = ["HELPERS", "CannotRenderError", "ChatTemplate", "TookTooLongError"]

_MOST_SOURCE_BYTES: Final = 2**18
"""The longest that is known has a tenth of it."""
_MOST_RENDER_S: Final = 0.5
"""Of processor time: a chat of 100,000 tokens takes a hundredth of it."""
_STEPS_A_LOOK: Final = 256
_MOST_REPEATED: Final = 10**6
_MOST_NUMBER: Final = 2**63
_MOST_INDENT: Final = 16
_GLOBALS: Final = frozenset({"range", "dict", "cycler", "joiner", "namespace"})
"""Of Jinja's own; `lipsum` loops as often as it is told, and says something else each time."""
_NOT_FILTERS: Final = frozenset(
    {
        *("batch", "center", "filesizeformat", "format", "indent", "round", "slice", "wordwrap"),
        *("pprint", "striptags", "sum", "urlize", "xmlattr"),
        "random",
    }
)
"""They loop or allocate by a number, take the square of what is long, or are never the same.
Templates with them are left to the instance."""
_NOT_METHODS: Final = frozenset({"center", "expandtabs", "ljust", "rjust", "to_bytes", "zfill"})
"""Nor they, of texts and numbers."""


class CannotRenderError(ValueError):
    """This chat, or any with this template, is the instance's to render."""


class TookTooLongError(Exception):
    """A template did not come to its end in time."""


class _Meter(threading.local):
    """The processor time that the rendering on this thread may still take."""

    deadline_s = float("inf")
    num_steps = 0

    def start(self, most_s: float) -> None:
        self.deadline_s = time.thread_time() + most_s

    def step(self) -> None:
        self.num_steps += 1
        if self.num_steps % _STEPS_A_LOOK == 0 and time.thread_time() > self.deadline_s:
            raise TookTooLongError


class _Generation(Extension):
    """`{% generation %}` marks what a model has said, for training; it changes no text."""

    tags = {"generation"}  # noqa: RUF012 - Jinja's name and kind of it

    def parse(self, parser: Parser) -> nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        call = self.call_method("as_it_is")
        return nodes.CallBlock(call, [], [], body).set_lineno(line)

    def as_it_is(self, caller: Callable[[], str]) -> str:
        return caller()


def _to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | str | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """Jinja's own filter would escape for HTML."""
    if indent and (len(indent) if isinstance(indent, str) else indent) > _MOST_INDENT:
        raise SecurityError(f"tojson indents by at most {_MOST_INDENT}")
    return json.dumps(
        value,
        ensure_ascii=ensure_ascii,
        indent=indent,
        separators=separators,
        sort_keys=sort_keys,
    )


def _raise_exception(message: str) -> None:
    raise jinja2.TemplateError(message)


def _strftime_now(form: str) -> str:
    return datetime.now().strftime(form)  # noqa: DTZ005 - local time, as there


HELPERS: Final[Mapping[str, Callable[..., Any]]] = {
    "raise_exception": _raise_exception,
    "strftime_now": _strftime_now,
}
"""Functions that templates find besides Jinja's."""


class _Sandbox(ImmutableSandboxedEnvironment):
    intercepted_binops = frozenset({"*", "%", "**"})

    def __init__(self) -> None:
        super().__init__(
            trim_blocks=True,
            lstrip_blocks=True,
            extensions=[_Generation, loopcontrols],
            optimized=False,  # it would run filters while compiling
        )
        self.meter = _Meter()
        mine = {**self.filters, "tojson": _to_json}
        self.filters = {
            name: self._metered(use) for name, use in mine.items() if name not in _NOT_FILTERS
        }
        known = {name: value for name, value in self.globals.items() if name in _GLOBALS}
        self.globals = {**known, **HELPERS}

    def call(self, context: Context, function: Any, /, *args: Any, **kwargs: Any) -> Any:
        self.meter.step()
        if getattr(function, "__name__", None) in _NOT_METHODS:
            raise SecurityError(f"{function.__name__}()")
        return super().call(context, function, *args, **kwargs)

    def call_binop(self, context: Context, operator: str, left: Any, right: Any) -> Any:
        """Powers, formats, and products of what is long could take for ever."""
        if operator == "*" and isinstance(left, str) and isinstance(right, int):
            fits = len(left) * right <= _MOST_REPEATED
        else:
            fits = operator != "**" and all(
                isinstance(side, int | float) and abs(side) < _MOST_NUMBER for side in (left, right)
            )
        if not fits:
            raise SecurityError(f"{operator} of {type(left).__name__} and {type(right).__name__}")
        return super().call_binop(context, operator, left, right)

    def wrap_str_format(self, value: Any) -> Callable[..., str] | None:
        """A form may tell a width."""
        found = super().wrap_str_format(value)
        if found is not None and ":" in value.__self__:
            raise SecurityError("format() with more than names")
        return found

    def counted(self, items: Iterable[Any]) -> Iterator[Any]:
        """What a loop goes through, with a look at the time."""
        for item in items:
            self.meter.step()
            yield item

    def _metered(self, use: Callable[..., Any]) -> Callable[..., Any]:
        """A filter that is a step.  Those that want a context are not run while compiling."""
        wants = getattr(use, "jinja_pass_arg", None)  # Jinja's mark; an enumeration of its own

        @pass_context
        def metered(context: Context, *args: Any, **kwargs: Any) -> Any:
            self.meter.step()
            match wants and wants.name:
                case "context":
                    return use(context, *args, **kwargs)
                case "eval_context":
                    return use(context.eval_ctx, *args, **kwargs)
                case "environment":
                    return use(context.environment, *args, **kwargs)
            return use(*args, **kwargs)

        return metered


class ChatTemplate:
    """One template, compiled.  Threads may share it.

    Args:
        source: Jinja.
        most_s: processor time of one rendering.

    Raises:
        CannotRenderError: it is too long, or is none.
    """

    def __init__(self, source: str, *, most_s: float = _MOST_RENDER_S) -> None:
        if len(source) > _MOST_SOURCE_BYTES:
            raise CannotRenderError(
                f"a chat template of {len(source):,} characters; at most {_MOST_SOURCE_BYTES:,}"
            )
        self.source = source
        self._most_s = most_s
        self._sandbox = _Sandbox()
        try:
            tree = self._sandbox.parse(source)
            self.variables = frozenset(meta.find_undeclared_variables(tree))
            """Names that it looks up."""
            self._count_loops(tree)
            self._template = self._sandbox.from_string(tree)
        except (jinja2.TemplateError, RecursionError, SyntaxError) as error:
            raise CannotRenderError(f"no chat template of Jinja: {error}") from error

    def render(self, variables: Mapping[str, Any]) -> str:
        """The text of a chat.

        Raises:
            CannotRenderError: the template refuses it, or fails.
            TookTooLongError: it did not end.
        """
        self._sandbox.meter.start(self._most_s)
        try:
            return self._template.render(variables)
        except TookTooLongError:
            raise
        except Exception as error:  # a template is a program: it may raise anything
            raise CannotRenderError(f"{type(error).__name__}: {error}") from error

    def _count_loops(self, tree: nodes.Template) -> None:
        for loop in tree.find_all(nodes.For):
            function = nodes.EnvironmentAttribute("counted")
            counted = nodes.Call(function, [loop.iter], [], None, None)
            loop.iter = counted.set_lineno(loop.lineno).set_environment(self._sandbox)
