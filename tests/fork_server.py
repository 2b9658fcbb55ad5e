"""Imports what is slow to import once, and runs programs in forks of itself.

``python fork_server.py MODULE...`` imports the modules.  Each line of stdin is a job: a script, its
arguments, what to add to the environment, and where its output goes.  Its exit code is the answer.
"""

from __future__ import annotations

import importlib
import json
import os
import runpy
import sys
from pathlib import Path
from typing import Any, NoReturn


def main() -> None:
    codes = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what the modules say is no answer
    for name in sys.argv[1:]:
        importlib.import_module(name)
    for line in sys.stdin:
        child = os.fork()
        if not child:
            become(json.loads(line))
        _, status = os.waitpid(child, 0)
        codes.write(f"{os.waitstatus_to_exitcode(status)}\n")
        codes.flush()


def become(job: dict[str, Any]) -> NoReturn:
    """Do as `python SCRIPT ARGUMENTS...` would."""
    log = os.open(job["log"], os.O_WRONLY | os.O_CREAT, 0o600)
    os.dup2(log, 1)
    os.dup2(log, 2)
    os.environ.update(job["environment"])
    sys.argv = [job["script"], *job["arguments"]]
    sys.path[0] = str(Path(job["script"]).parent)
    runpy.run_path(job["script"], run_name="__main__")
    raise SystemExit


if __name__ == "__main__":
    main()
