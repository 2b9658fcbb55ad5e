"""Every call of torch_npu in npu/, against the real wheel: names, arguments, types of literals.

A mock accepts any argument.  The dispatcher of the wheel does not, and its schemas are asked here
for every call in the source, also for those on paths that no test takes.  Types of what is no
literal are the dispatcher's own matter, at each call.
"""

from __future__ import annotations

import ast
import dataclasses
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

import xllm_plugin.npu

FOLDER = Path(xllm_plugin.npu.__file__).parent

OPERATORS, DEVICE = ("torch_npu.", "torch.ops.npu."), "torch.npu."
"""What is called by a schema, and what is a Python function of the wheel."""

ALLOWED = {
    ("memory.py", "torch_npu._C._construct_storage_from_data_pointer"),  # no operator; test_memory
    ("selftest.py", "torch.ops.npu"),  # by the names of its cases, which test_selftest calls
}
"""Uses that are no call by name."""


@dataclass(frozen=True)
class Call:
    """One call.

    Attributes:
        where: file and line.
        path: as it is written, "torch_npu.npu_swiglu".
        positional: arguments given by position.
        named: arguments given by name.
        has_stars: whether `*` or `**` brings others.
    """

    where: str
    path: str
    positional: tuple[ast.expr, ...]
    named: dict[str, ast.expr]
    has_stars: bool

    @property
    def operator(self) -> str:
        """The operator's name, or "" for a call that is none."""
        for prefix in OPERATORS:
            if self.path.startswith(prefix):
                return self.path.removeprefix(prefix)
        return ""


def uses_in(source: str, name: str) -> Iterator[Call | str]:
    """Each call of the wheel, and in words each use of it that is none."""
    tree = ast.parse(source)
    parents = {child: node for node in ast.walk(tree) for child in ast.iter_child_nodes(node)}
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("torch_npu"):
            yield f"{name}:{node.lineno}: from {node.module} import ..."
        elif isinstance(node, ast.Import):
            for alias in node.names:
                if alias.name.startswith("torch_npu") and (alias.asname or "." in alias.name):
                    yield f"{name}:{node.lineno}: import {alias.name} under another name"
        elif isinstance(node, ast.Attribute | ast.Name):
            parent, path = parents[node], ast.unparse(node)
            is_whole = not isinstance(parent, ast.Attribute)
            is_theirs = f"{path}.".startswith((*OPERATORS, DEVICE)) or path == "torch.ops"
            if is_whole and is_theirs and (name, path) not in ALLOWED:
                where = f"{name}:{node.lineno}"
                if isinstance(parent, ast.Call) and parent.func is node:
                    yield call_of(parent, path, where)
                else:
                    yield f"{where}: {path} is no call"


def call_of(node: ast.Call, path: str, where: str) -> Call:
    named = {keyword.arg: keyword.value for keyword in node.keywords if keyword.arg is not None}
    has_stars = len(named) < len(node.keywords) or any(
        isinstance(argument, ast.Starred) for argument in node.args
    )
    return Call(where, path, tuple(node.args), named, has_stars)


@dataclass(frozen=True)
class Argument:
    """Of an operator's schema."""

    name: str
    keyword_only: bool
    has_default: bool
    type: str


def mismatch(call: Call, schemas: dict[str, list[Argument]]) -> str | None:
    """What is wrong with a call of an operator, or None."""
    if call.operator not in schemas:
        return f"{call.where}: torch_npu has no operator {call.operator}"
    if call.has_stars:
        return f"{call.where}: {call.operator} is called with * or **, which cannot be checked"
    arguments = {one.name: one for one in schemas[call.operator]}
    positional = [one.name for one in arguments.values() if not one.keyword_only]
    if len(call.positional) > len(positional):
        return f"{call.where}: {call.operator} takes {len(positional)} by position"
    by_position = dict(zip(positional, call.positional, strict=False))
    given = by_position | call.named
    wrong = {
        "unknown": given.keys() - arguments.keys(),
        "missing": {one.name for one in arguments.values() if not one.has_default} - given.keys(),
        "twice": by_position.keys() & call.named.keys(),
        "of another type": {
            name
            for name, value in given.items()
            if name in arguments and is_misfit(value, arguments[name].type)
        },
    }
    found = [f"{what} {sorted(names)}" for what, names in wrong.items() if names]
    return f"{call.where}: {call.operator}: {', '.join(found)}" if found else None


LITERALS = {
    bool: {"bool"},
    int: {"int", "float", "number"},
    float: {"float", "number"},
    str: {"str"},
}


def is_misfit(value: ast.expr, wanted: str) -> bool:
    """Whether a literal is not of the type wanted; what is no literal shows when it is called."""
    if isinstance(value, ast.IfExp):
        return is_misfit(value.body, wanted) or is_misfit(value.orelse, wanted)
    if wanted.startswith("Optional["):
        wanted = wanted.removeprefix("Optional[").removesuffix("]")
        if isinstance(value, ast.Constant) and value.value is None:
            return False
    if isinstance(value, ast.List | ast.Tuple):
        element = wanted.removeprefix("List[").removesuffix("]")
        return element == wanted or any(is_misfit(one, element) for one in value.elts)
    if isinstance(value, ast.UnaryOp):
        value = value.operand
    if not isinstance(value, ast.Constant):
        return False
    return wanted not in LITERALS.get(type(value.value), ())


ONE = {
    "npu_norm": [
        Argument("input", False, False, "Tensor"),
        Argument("gamma", False, False, "Tensor"),
        Argument("epsilon", False, True, "float"),
        Argument("sizes", True, True, "Optional[List[int]]"),
        Argument("mode", True, True, "str"),
    ]
}


@pytest.mark.parametrize(
    ("call", "found"),
    [
        ("torch_npu.npu_norm(x, g, epsilon=1)", None),
        ("torch_npu.npu_norm(x, gamma=g)", None),
        ("torch_npu.npu_norm(x, g, sizes=[1, n, -1])", None),
        ("torch_npu.npu_norm(x, g, sizes=None, mode=m if n else 'a')", None),
        ("torch_npu.npu_norm(x, g, sizes=None if n else [1])", None),
        ("torch_npu.npu_norm(x, g, eps=1)", "unknown ['eps']"),
        ("torch_npu.npu_norm(x)", "missing ['gamma']"),
        ("torch_npu.npu_norm(x, g, 1, 2)", "takes 3 by position"),
        ("torch_npu.npu_norm(x, g, gamma=g)", "twice ['gamma']"),
        ("torch_npu.npu_norm_rms(x)", "no operator npu_norm_rms"),
        ("torch_npu.npu.npu_norm(x, g)", "no operator npu.npu_norm"),
        ("torch.ops.npu.npu_norm.default(x, g)", "no operator npu_norm.default"),
        ("torch.ops.npu.npu_norm(*both)", "cannot be checked"),
        ("torch.ops.npu.npu_norm(x, g, **more)", "cannot be checked"),
        ("torch_npu.npu_norm(x, g, epsilon='1')", "of another type ['epsilon']"),
        ("torch_npu.npu_norm(x, g, epsilon=None)", "of another type ['epsilon']"),
        ("torch_npu.npu_norm(x, 1.0)", "of another type ['gamma']"),
        ("torch_npu.npu_norm(x, g, sizes=[1.5])", "of another type ['sizes']"),
        ("torch_npu.npu_norm(x, g, sizes=1)", "of another type ['sizes']"),
        ("torch_npu.npu_norm(x, g, mode=m if n else 3)", "of another type ['mode']"),
    ],
)
def test_the_check_finds_what_is_wrong(call: str, found: str | None) -> None:
    (parsed,) = uses_in(call, "here")
    assert isinstance(parsed, Call)
    wrong = mismatch(parsed, ONE)
    assert wrong is None if found is None else found in str(wrong)


@pytest.mark.parametrize(
    "use",
    [
        "norm = torch_npu.npu_norm",
        "functools.partial(torch.ops.npu.npu_norm, x)",
        "getattr(torch_npu, name)(x)",
        "getattr(torch.ops, 'npu')",
        "events = map(torch.npu.Event, range(3))",
        "from torch_npu import npu_norm",
        "import torch_npu as wheel",
        "import torch_npu.npu",
    ],
)
def test_no_use_escapes_the_check(use: str) -> None:
    (found,) = uses_in(use, "here")
    assert isinstance(found, str)


@pytest.fixture(scope="module")
def calls() -> list[Call]:
    """Of the whole family."""
    uses = [
        use
        for file in sorted(FOLDER.rglob("*.py"))
        for use in uses_in(file.read_text(encoding="utf-8"), file.name)
    ]
    assert [use for use in uses if isinstance(use, str)] == []
    return [use for use in uses if isinstance(use, Call)]


@pytest.mark.npu
def test_every_call_fits_the_wheels_schema(
    calls: list[Call], on_device: Callable[..., Any]
) -> None:
    operators = [call for call in calls if call.operator]
    assert {call.operator for call in operators} >= {
        "npu_add_rms_norm",
        "npu_fused_infer_attention_score_v2",
        "npu_grouped_matmul",
        "npu_interleave_rope",
        "npu_kv_rmsnorm_rope_cache",
        "npu_moe_gating_top_k",
        "npu_moe_init_routing_v2",
        "npu_moe_token_unpermute",
        "npu_mrope",
        "npu_rms_norm",
        "npu_scatter_pa_kv_cache",
        "npu_swiglu",
        "npu_top_k_top_p",
    }
    found = on_device(
        f"""
        import torch, torch_npu
        result = {{}}
        for name in {sorted({call.operator for call in operators})}:
            if hasattr(torch_npu, name) and hasattr(torch.ops.npu, name):
                schema = getattr(torch.ops.npu, name).default._schema
                result[name] = [[a.name, a.kwarg_only, a.has_default_value(), str(a.type)]
                                for a in schema.arguments]
        """
    )
    schemas = {name: [Argument(*one) for one in arguments] for name, arguments in found.items()}
    assert [wrong for call in operators if (wrong := mismatch(call, schemas))] == []
    for call in operators:  # the same calls with one name that is not the schema's
        names = {f"{name}_": value for name, value in call.named.items()}
        if names:
            assert "unknown" in str(mismatch(dataclasses.replace(call, named=names), schemas))


@pytest.mark.npu
def test_every_call_of_the_device_fits_the_wheels_functions(
    calls: list[Call], on_device: Callable[..., Any]
) -> None:
    """`torch.npu.X(...)`, Python of the wheel: by its signatures."""
    device = [call for call in calls if call.path.startswith(DEVICE)]
    assert {call.path for call in device} >= {"torch.npu.NPUGraph", "torch.npu.graph"}
    assert not [call.where for call in device if call.has_stars]
    asked = [[call.path, len(call.positional), list(call.named)] for call in device]
    wrong = on_device(
        f"""
        import inspect, torch, torch_npu
        asked = {asked} + [["torch.npu.graph", 1, ["dispatch"]], ["torch.npu.absent", 0, []]]
        result = []
        for path, num_positional, names in asked:
            try:
                signature = inspect.signature(eval(path))
                signature.bind(*range(num_positional), **dict.fromkeys(names))
            except (AttributeError, TypeError, ValueError) as error:
                result.append(f"{{path}}: {{error}}")
        """
    )
    *found, by_name, by_path = wrong  # of the two mistakes at the end
    assert found == []
    assert "dispatch" in by_name
    assert "absent" in by_path


def test_the_self_test_tries_every_operator_that_is_called(calls: list[Call]) -> None:
    """Each of its cases runs on the device and on the host (test_selftest)."""
    source = (FOLDER / "selftest.py").read_text(encoding="utf-8")
    assert [name for call in calls if (name := call.operator) and f'"{name}"' not in source] == []
