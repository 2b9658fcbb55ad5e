"""``python -m xllm_plugin.testing.cann``: prepare the emulator, and say how to use it."""

from __future__ import annotations

import os
import shlex
import sys

from xllm_plugin.errors import XllmError
from xllm_plugin.testing.cann import prepare_emulator


def main() -> None:
    """Write to stdout what a shell has to export."""
    try:
        emulator = prepare_emulator()
    except XllmError as error:
        error.stop()
    for name, value in sorted(emulator.environment().items()):
        if os.environ.get(name) != value:
            sys.stdout.write(f"export {name}={shlex.quote(value)}\n")


if __name__ == "__main__":
    main()
