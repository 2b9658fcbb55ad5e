"""`make serve`: prepare a model, serve it, and say what to type once it answers.

Everything it does can be done by hand: `xllm serve "$(xllm model smollm2)"`.
"""

from __future__ import annotations

import argparse
import json
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import httpx

from xllm_plugin.errors import XllmError
from xllm_plugin.models import prepare

PROGRESS_INTERVAL_S = 10.0
POLL_INTERVAL_S = 0.5
GRACE_S = 30.0
# Some 46,000 tokens of the demo model.
KV_CACHE_BYTES = 2**30


def main() -> int:
    """Serve until interrupted; return the server's exit code."""
    parser = argparse.ArgumentParser(
        description=__doc__, epilog="Anything else is passed on to `xllm serve`."
    )
    parser.add_argument(
        "--model", default="smollm2", help="a name of `xllm model --list`, or a folder"
    )
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--port", type=int, default=8000)
    arguments, rest = parser.parse_known_args()
    try:
        model = arguments.model if Path(arguments.model).is_dir() else str(prepare(arguments.model))
    except XllmError as error:
        error.stop()
    command = [
        sys.executable, "-m", "xllm_plugin.cli", "serve", model,
        "--served-model-name", Path(model).name,
        "--host", arguments.host, "--port", str(arguments.port),
        # Left alone, vLLM takes 92 % of the machine's memory and stops where that is not free.
        "--kv-cache-memory-bytes", str(KV_CACHE_BYTES), *rest,
    ]  # fmt: skip
    say("starting: " + " ".join(command[1:]))
    server = subprocess.Popen(command)
    url = f"http://{arguments.host}:{arguments.port}"
    threading.Thread(target=announce, args=(server, url, Path(model).name), daemon=True).start()
    return wait(server)


def wait(server: subprocess.Popen[bytes]) -> int:
    """Wait for the server; an interrupt reaches it from the terminal, a TERM is passed on.

    A server that is stopped while its engine starts may never end: it is killed in the end.
    """
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    try:
        return server.wait()
    except (KeyboardInterrupt, SystemExit):
        server.terminate()
        try:
            return server.wait(GRACE_S)
        except subprocess.TimeoutExpired:
            server.kill()
            return server.wait()


def announce(server: subprocess.Popen[bytes], url: str, name: str) -> None:
    """Print progress until the server is healthy, then the line to try."""
    started_s = last_s = time.monotonic()
    while server.poll() is None:
        if is_healthy(url):
            say(
                f"ready after {time.monotonic() - started_s:.0f} s. Try:\n\n"
                f"{curl_line(url, name)}\n"
            )
            return
        if time.monotonic() - last_s >= PROGRESS_INTERVAL_S:
            last_s = time.monotonic()
            say(
                f"still starting, {last_s - started_s:.0f} s "
                "(about a quarter of a minute; minutes for a model that vLLM has to compile)"
            )
        time.sleep(POLL_INTERVAL_S)


def is_healthy(url: str) -> bool:
    """Ask the server whether it is up."""
    try:
        # This machine's own server is reached without any proxy.
        response = httpx.get(f"{url}/health", timeout=2.0, trust_env=False)
    except httpx.HTTPError:
        return False
    return response.status_code == httpx.codes.OK


def curl_line(url: str, name: str) -> str:
    """Return a command that asks the model something."""
    question = [{"role": "user", "content": "What is 7 + 5?"}]
    body = json.dumps({"model": name, "messages": question, "temperature": 0})
    return (
        f"  curl {url}/v1/chat/completions -H 'Content-Type: application/json' \\\n    -d '{body}'"
    )


def say(text: str) -> None:
    """Print where the server's own log goes, at once."""
    sys.stderr.write(f"make serve: {text}\n")
    sys.stderr.flush()


if __name__ == "__main__":
    sys.exit(main())
