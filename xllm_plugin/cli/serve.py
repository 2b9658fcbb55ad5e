"""`xllm serve MODEL ...` is `vllm serve MODEL ... --platform xllm`, through vLLM's command."""

from __future__ import annotations

import sys

import click

from xllm_plugin import shims
from xllm_plugin.errors import PlatformError
from xllm_plugin.startup import check_vllm_version, vllm_version

__all__ = ["serve"]


@click.command(
    # vLLM parses everything, `--help` included.
    context_settings={"ignore_unknown_options": True, "help_option_names": []},
    add_help_option=False,
)
@click.argument("arguments", nargs=-1, type=click.UNPROCESSED)
def serve(arguments: tuple[str, ...]) -> None:
    """Serve a model over the OpenAI API; takes every flag of `vllm serve`."""
    shims.install()
    if vllm_version() is None:
        # The platform plugin checks which version it is, unless --platform native wants any.
        check_vllm_version(None)
    try:
        from vllm.entrypoints.cli.main import main
    except (ImportError, RuntimeError) as error:  # torch raises the second over a broken backend
        cause = f" ({error.__cause__})" if error.__cause__ else ""
        raise PlatformError(
            f"vLLM {vllm_version()} is installed but cannot be imported: {error}{cause}. "
            "`xllm doctor` says more."
        ) from error
    # vLLM looks at sys.argv in several places; argv[0] is how we know its command line as ours.
    sys.argv = ["vllm", "serve", *arguments]
    main()
