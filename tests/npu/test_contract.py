"""Every call of torch_npu in npu/, against the schemas of the real wheel.

A mock accepts any argument.  The dispatcher of the wheel does not, and it is asked here for every
call in the source, also for those on paths that no test takes.
"""

from __future__ import annotations

import ast
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

import xllm_plugin.npu

FOLDER = Path(xllm_plugin.npu.__file__).parent


@dataclass(frozen=True)
class Call:
    """One call of an operator.

    Attributes:
        where: file and line.
        operator: name in torch_npu.
        num_positional: arguments given by position.
        keywords: arguments given by name; None for `**` and for a `*` before.
    """

    where: str
    operator: str
    num_positional: int
    keywords: tuple[str | None, ...]


def calls_in(source: str, name: str) -> Iterator[Call]:
    for node in ast.walk(ast.parse(source)):
        if not isinstance(node, ast.Call) or not isinstance(node.func, ast.Attribute):
            continue
        path = ast.unparse(node.func)
        for prefix in ("torch_npu.", "torch.ops.npu."):
            operator = path.removeprefix(prefix)
            if operator != path and not operator.startswith("_C.") and "." not in operator:
                starred = any(isinstance(argument, ast.Starred) for argument in node.args)
                keywords = [keyword.arg for keyword in node.keywords]
                yield Call(
                    f"{name}:{node.lineno}",
                    operator,
                    len(node.args),
                    (*keywords, None) if starred else tuple(keywords),
                )


def mismatch(call: Call, schemas: dict[str, list[Any]]) -> str | None:
    """What is wrong with a call, or None; schemas are [[name, keyword only, has default], ...]."""
    if call.operator not in schemas:
        return f"{call.where}: torch_npu has no {call.operator}"
    if None in call.keywords:
        return f"{call.where}: {call.operator} is called with * or **, which cannot be checked"
    arguments = schemas[call.operator]
    positional = [name for name, keyword_only, _ in arguments if not keyword_only]
    if call.num_positional > len(positional):
        return f"{call.where}: {call.operator} takes {len(positional)} by position"
    given = [*positional[: call.num_positional], *call.keywords]
    unknown = set(given) - {name for name, _, _ in arguments}
    missing = {name for name, _, has_default in arguments if not has_default} - set(given)
    twice = {name for name in given if given.count(name) > 1}
    if unknown or missing or twice:
        return (
            f"{call.where}: {call.operator}: unknown {sorted(map(str, unknown))}, "
            f"missing {sorted(missing)}, twice {sorted(map(str, twice))}"
        )
    return None


ONE = {"npu_rms_norm": [["input", False, False], ["gamma", False, False], ["epsilon", False, True]]}


@pytest.mark.parametrize(
    ("call", "found"),
    [
        ("torch_npu.npu_rms_norm(x, g, epsilon=1)", None),
        ("torch_npu.npu_rms_norm(x, gamma=g)", None),
        ("torch_npu.npu_rms_norm(x, g, eps=1)", "unknown ['eps']"),
        ("torch_npu.npu_rms_norm(x)", "missing ['gamma']"),
        ("torch_npu.npu_rms_norm(x, g, 1, 2)", "takes 3 by position"),
        ("torch_npu.npu_rms_norm(x, g, gamma=g)", "twice ['gamma']"),
        ("torch_npu.npu_norm_rms(x)", "has no npu_norm_rms"),
        ("torch.ops.npu.npu_rms_norm(*both)", "cannot be checked"),
    ],
)
def test_the_check_finds_what_is_wrong(call: str, found: str | None) -> None:
    (parsed,) = calls_in(call, "here")
    wrong = mismatch(parsed, ONE)
    assert wrong is None if found is None else found in str(wrong)


@pytest.mark.npu
def test_every_call_fits_the_wheels_schema(on_device: Callable[..., Any]) -> None:
    calls = [
        call
        for file in sorted(FOLDER.rglob("*.py"))
        for call in calls_in(file.read_text(encoding="utf-8"), file.name)
    ]
    assert {call.operator for call in calls} >= {
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
    }
    schemas = on_device(
        f"""
        import torch, torch_npu
        result = {{}}
        for name in {sorted({call.operator for call in calls})}:
            if hasattr(torch_npu, name) and hasattr(torch.ops.npu, name):
                schema = getattr(torch.ops.npu, name).default._schema
                result[name] = [[a.name, a.kwarg_only, a.has_default_value()]
                                for a in schema.arguments]
        """
    )
    assert [wrong for call in calls if (wrong := mismatch(call, schemas))] == []
