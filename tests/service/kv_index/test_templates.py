"""Chat templates: what Jinja makes of them, and that none takes the service with it."""

from __future__ import annotations

import threading
import time
from itertools import count
from typing import Any

import jinja2
import pytest

from xllm_plugin.service.kv_index import templates
from xllm_plugin.service.kv_index.templates import CannotRenderError, ChatTemplate, TookTooLongError


def rendered(source: str, **variables: Any) -> str:
    return ChatTemplate(source).render(variables)


def test_blocks_take_no_lines_of_their_own() -> None:
    source = "{% for m in messages %}\n    {% if m %}\n{{ m }}\n    {% endif %}\n{% endfor %}"
    assert rendered(source, messages=["a", "b"]) == "a\nb\n"


def test_what_templates_of_models_use_is_there() -> None:
    assert rendered("{{ x | tojson }}", x={"b": "<é>", "a": 1}) == '{"b": "<é>", "a": 1}'
    assert rendered("{{ x | tojson(indent=1, sort_keys=true) }}", x={"b": 2, "a": 1}) == (
        '{\n "a": 1,\n "b": 2\n}'
    )
    assert (
        rendered(
            "{% for i in x %}{% if i > 1 %}{% break %}{% endif %}{{ i }}{% endfor %}", x=[1, 2]
        )
        == "1"
    )
    assert rendered("a{% generation %}{{ x }}{% endgeneration %}c", x="b") == "abc"
    assert rendered("{{ 7 % 4 }} {{ 2 * 3 }} {{ '-' * 3 }}") == "3 6 ---"
    assert len(rendered("{{ strftime_now('%Y') }}")) == 4
    with pytest.raises(CannotRenderError, match="roles must alternate"):
        rendered("{{ raise_exception('roles must alternate') }}")


LOOP = (
    "{% for x in items %}{{ loop.index }}{{ loop.first }}{{ loop.last }}{{ loop.length }}"
    "{{ loop.revindex0 }}{{ loop.previtem }}{{ loop.nextitem }}{{ loop.cycle('a', 'b') }}"
    "{{ x }};{% else %}none{% endfor %}"
)
SOURCES = (
    LOOP,
    "{% for x in items if x != 'b' %}{{ loop.length }}{{ x }}{% endfor %}",
    (
        "{% for x in items recursive %}{{ x }}{% if loop.depth < 3 %}{{ loop(x) }}{% endif %}"
        "{% endfor %}"
    ),
    "{% macro f(n) %}{{ n }}{% if n %}{{ f(n - 1) }}{% endif %}{% endmacro %}{{ f(4) }}",
    "{% for x in items %}{% for y in items[loop.index0:] %}{{ x ~ y }}{% endfor %}{% endfor %}",
    "{% for key, value in table.items() %}{{ key }}={{ value }};{% endfor %}",
    "{% for x in nothing %}{{ x }}{% else %}none{% endfor %}",
    "{% set n = namespace(n=0) %}{% for x in items %}{% set n.n = n.n + 1 %}{% endfor %}{{ n.n }}",
)


@pytest.mark.parametrize("source", SOURCES)
@pytest.mark.parametrize("items", [[], ["a"], ["a", "b", "c"], "text"])
def test_loops_that_are_counted_are_loops_as_ever(source: str, items: Any) -> None:
    variables = {"items": items, "table": {"k": 1, "l": 2}}
    assert rendered(source, **variables) == jinja2.Template(source).render(variables)


ENDLESS = (
    "{{ range(99999) | map('string') | map('trim') | map('upper') | list | length }}",
    "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}",
    (
        "{% set r = range(9999) | list %}{% for a in r %}{% for b in r %}{% for c in r %}"
        "{{ c }}{% endfor %}{% endfor %}{% endfor %}"
    ),
    (
        "{% for a in range(9) if range(99999) | list | length > 9999999 %}{% else %}"
        "{% macro f(n) %}{% if n %}{{ f(n - 1) }}{{ f(n - 1) }}{% endif %}{% endmacro %}{{ f(60) }}"
        "{% endfor %}"
    ),
)


@pytest.mark.parametrize("source", ENDLESS)
def test_a_template_without_end_is_ended(source: str) -> None:
    template = ChatTemplate(source, most_s=0.02)
    with pytest.raises(TookTooLongError):
        template.render({})


def test_every_turn_of_a_loop_counts() -> None:
    with pytest.raises(TookTooLongError):
        ChatTemplate("{% for x in items %}{% endfor %}", most_s=0.02).render({"items": count()})


def test_threads_have_a_time_each() -> None:
    """One that renders in the midst of another's rendering leaves the other's alone."""
    template = ChatTemplate("{{ other() }}{% for a in range(9999) %}{% endfor %}done", most_s=0.5)
    found: list[str] = []

    def other() -> str:
        thread = threading.Thread(
            target=lambda: found.append(template.render({"other": lambda: "x"}))
        )
        thread.start()
        thread.join()
        return "y"

    spend_s = time.thread_time() + 1.0  # more than the other thread will have by far
    while time.thread_time() < spend_s:
        pass
    assert template.render({"other": other}) == "ydone"
    assert found == ["xdone"]


@pytest.mark.parametrize(
    "source",
    [
        "{{ 9 ** 9 ** 9 }}",
        "{{ 'x' * 999999999 }}",
        "{{ '%999999999d' % 1 }}",
        "{% set n = namespace(n=9) %}{% for i in range(99) %}{% set n.n = n.n * n.n %}{% endfor %}",
        "{{ range(999999999) }}",
        "{{ ''.__class__.__mro__ }}",
        "{{ messages.append(1) }}",
        "{{ messages.nothing.at.all }}",
        "{{ 1 / 0 }}",
        "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
        "{{ lipsum(n=99999999) }}",
        "{{ [] | slice(999999999) | list }}",
        "{{ [[]] | map('slice', 999999999) | list }}",
        "{{ [[]] | map('batch', 999999999, 1) | map('list') | list }}",
        "{{ 'x' | center(999999999) }}",
        "{{ 'x' | wordwrap(1) }}",
        "{{ 'x\ny' | indent(999999999) }}",
        "{{ 1 | round(999999999, 'ceil') }}",
        "{{ '%999999999d' | format(1) }}",
        "{{ [1] | tojson(indent=999999999) }}",
        "{{ 'x'.center(999999999) }}",
        "{{ 'x'['ljust'](999999999) }}",
        "{{ (5).to_bytes(999999999) }}",
        "{{ '{:999999999}'.format(1) }}",
        "{{ '{:{}}'.format_map({}) }}",
        "{% include 'x' %}",
    ],
)
def test_what_a_template_may_not_is_an_error_of_its_own(source: str) -> None:
    with pytest.raises(CannotRenderError):
        rendered(source, messages=[])


@pytest.mark.parametrize(
    "source", ["{% for", "{{ x | nofilter }}", "{{ 1 }}" * 99_999, "(" * 9 + "{{ " + "(" * 9999]
)
def test_what_is_no_template_is_refused_when_it_is_read(source: str) -> None:
    with pytest.raises(CannotRenderError):
        ChatTemplate(source)


def test_nothing_of_a_template_runs_while_it_is_compiled(monkeypatch: pytest.MonkeyPatch) -> None:
    """No meter runs then; Jinja would compute what is constant."""
    steps: list[object] = []

    def step(meter: object) -> None:
        steps.append(meter)

    monkeypatch.setattr(templates._Meter, "step", step)
    source = (
        "{{ [1, 2] | join }}{% if 'a' | upper %}{{ [2, 1] | sort }}{% endif %}"
        "{% autoescape 'a' | upper %}{{ ['a'] | map('upper') | list }}{% endautoescape %}"
    )
    template = ChatTemplate(source)
    assert not steps
    assert template.render({}) == "12[1, 2][&#39;A&#39;]"
    assert steps


def test_filters_are_the_same_as_ever() -> None:
    """Of all three kinds: with a context, with an environment, and with neither."""
    source = (
        "{{ x | selectattr('a', 'equalto', 1) | map(attribute='b') | join(',') }}"
        "{{ x | map(attribute='a') | map('string') | list }}{{ (x | sort(attribute='b'))[0].b }}"
        "{{ ' a ' | trim | replace('a', 'b') | upper }}{{ none | default('d', true) }}"
        "{{ '{} {x}'.format(1, x=2) }}{% filter upper %}a{% endfilter %}{{ (x | last).a }}"
    )
    items = [{"a": 1, "b": "q"}, {"a": 2, "b": "p"}]
    assert rendered(source, x=items) == jinja2.Template(source).render(x=items)


def test_the_variables_of_a_template_are_known() -> None:
    source = "{% set x = x | default(1) %}{% for m in messages %}{{ m }}{{ bos_token }}{% endfor %}"
    assert ChatTemplate(source).variables == {"x", "messages", "bos_token"}
