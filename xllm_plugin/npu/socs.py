"""Which chips the family runs on, by the name that CANN gives them.

Atlas A2 and A3 are the two for which torch_npu's documentation allows the operators called here.
Weights stay in the plain format (ND) on both: for bfloat16 that documentation names the other one,
NZ, with none of the operators that multiply weights here.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

__all__ = ["SOCS", "Soc", "soc_named"]


@dataclass(frozen=True, slots=True)
class Soc:
    """A kind of chip.

    Attributes:
        product: as in torch_npu's documentation.
        names: a pattern of CANN's names for it.
    """

    product: str
    names: str


SOCS = (
    Soc("Atlas A2", r"Ascend910B[1-9][\w-]*"),
    Soc("Atlas A3", r"Ascend910_93[\w-]*"),
)


def soc_named(name: str) -> Soc | None:
    """The kind of chip, or None where the family does not run on it."""
    return next((soc for soc in SOCS if re.fullmatch(soc.names, name)), None)
