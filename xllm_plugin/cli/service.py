"""`xllm service`: the global service, and commands that ask a running one."""

from __future__ import annotations

import functools
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlencode

import click
import httpx
import yaml

from xllm_plugin.cli.service_keys import keys
from xllm_plugin.errors import ConfigError, MisuseError, NotNowError, PlatformError
from xllm_plugin.tls import ClientFiles

__all__ = ["service"]

ADMIN_URL = "http://127.0.0.1:8001"


@click.group(invoke_without_command=True)
@click.option("--config", "file", type=click.Path(path_type=Path), help="YAML file of settings.")
@click.option("--host", help="Of the public port.  [default: 0.0.0.0]")
@click.option("--port", type=int, help="Public port.  [default: 8000]")
@click.option("--ssl-certfile", help="PEM; the public port speaks HTTPS.")
@click.option("--ssl-keyfile", help="PEM.  [default: in the certificate file]")
@click.option("--ssl-ca-certs", help="PEM; authorities of clients' certificates.")
@click.option("--ssl-cert-reqs", type=int, help="A client's certificate: 1 may, 2 must be there.")
@click.option("--admin-host", help="[default: 127.0.0.1]")
@click.option("--admin-port", type=int, help="[default: 8001]")
@click.option("--instance", "instances", multiple=True, metavar="URL", help="Repeat for each.")
@click.option("--etcd", metavar="URL", help="etcd://host:2379, shared with other services.")
@click.option("--processes", type=int, help="That carry traffic.  [default: 1]")
@click.option("--policy", help="Routing policy.  [default: cost]")
@click.option(
    "--set", "others", multiple=True, metavar="SECTION.NAME=VALUE", help="Any other setting."
)
@click.option("--check", is_flag=True, help="Check the settings and exit.")
@click.pass_context
def service(
    context: click.Context,
    *,
    file: Path | None,
    host: str | None,
    port: int | None,
    ssl_certfile: str | None,
    ssl_keyfile: str | None,
    ssl_ca_certs: str | None,
    ssl_cert_reqs: int | None,
    admin_host: str | None,
    admin_port: int | None,
    instances: tuple[str, ...],
    etcd: str | None,
    processes: int | None,
    policy: str | None,
    others: tuple[str, ...],
    check: bool,
) -> None:
    """Put one OpenAI endpoint in front of many vLLM servers.

    Settings come from flags, then XLLM_SERVICE_SECTION__NAME, then the file.  SIGHUP reads them
    again, SIGTERM drains.  The subcommands ask a service that runs.
    """
    if context.invoked_subcommand is not None:
        return
    flags = _flags(
        {
            "listen.host": host,
            "listen.port": port,
            "listen.ssl_certfile": ssl_certfile,
            "listen.ssl_keyfile": ssl_keyfile,
            "listen.ssl_ca_certs": ssl_ca_certs,
            "listen.ssl_cert_reqs": ssl_cert_reqs,
            "admin.host": admin_host,
            "admin.port": admin_port,
            "instances.static": list(instances) or None,
            "etcd.url": etcd,
            "service.processes": processes,
            "routing.policy": policy,
        },
        others,
    )
    try:
        from xllm_plugin.service import app
        from xllm_plugin.service.config import load
    except ImportError as error:
        raise PlatformError(
            f"the service's libraries are not installed ({error}): "
            "pip install 'xllm-plugin[service]'."
        ) from error
    config = load(flags, file)
    if check:
        app.check(config)
        click.echo("The settings are valid.")
        return
    app.run(config, lambda: load(flags, file))


def _flags(known: dict[str, Any], others: tuple[str, ...]) -> dict[str, Any]:
    """Nested settings out of dotted names."""
    given = {name: value for name, value in known.items() if value is not None}
    for other in others:
        name, equals, value = other.partition("=")
        if not equals or name.count(".") != 1:
            raise ConfigError(f"--set {other!r}: write SECTION.NAME=VALUE.")
        try:
            given[name] = yaml.safe_load(value)
        except yaml.YAMLError as error:
            raise ConfigError(f"--set {other!r}: the value is not YAML.") from error
    nested: dict[str, Any] = {}
    for name, value in given.items():
        section, _, field = name.partition(".")
        nested.setdefault(section, {})[field] = value
    return nested


@dataclass(frozen=True)
class _Admin:
    """The admin port of a running service."""

    url: str
    given_token: str | None
    files: ClientFiles

    @property
    def token(self) -> str:
        """The one that was given, or that the service has left for this user."""
        return self.given_token or _found_token(self.url)

    def ask(self, method: str, path: str) -> Any:
        """One request.

        Raises:
            NotNowError: nobody answers there.
            MisuseError: the answer is an error.
            ConfigError: a certificate cannot be used.
        """
        verify = self.files.context() if self.url.lower().startswith("https:") else True
        try:
            headers = {"Authorization": f"Bearer {self.token}"}
            url = self.url.rstrip("/") + path
            reply = httpx.request(method, url, headers=headers, timeout=10, verify=verify)
        except (httpx.HTTPError, httpx.InvalidURL) as error:
            raise NotNowError(
                f"no service answers on {self.url} ({error}); start one, or give --admin-url."
            ) from error
        if reply.status_code != httpx.codes.OK:
            raise MisuseError(f"{self.url}: {_message(reply)}")
        return reply.json()


def _remote(function: Callable[..., None]) -> Callable[..., None]:
    """Add the options by which a running service is found, and give it as `admin`."""

    @functools.wraps(function)
    def command(
        admin_url: str,
        token: str | None,
        ssl_ca_certs: Path | None,
        ssl_certfile: Path | None,
        ssl_keyfile: Path | None,
        **arguments: Any,
    ) -> None:
        files = ClientFiles(ssl_ca_certs, ssl_certfile, ssl_keyfile)
        function(admin=_Admin(admin_url, token, files), **arguments)

    path, found = click.Path(path_type=Path), command
    for name, what in (
        ("--ssl-keyfile", "Its key, PEM.  [default: in the certificate file]"),
        ("--ssl-certfile", "Our certificate, PEM, if the service asks for one."),
        ("--ssl-ca-certs", "Authorities of the service's certificate.  [default: the system's]"),
    ):
        found = click.option(name, type=path, help=what)(found)
    found = click.option(
        "--token", help="[default: XLLM_SERVICE_ADMIN__TOKEN, else what the service left]"
    )(found)
    return click.option("--admin-url", default=ADMIN_URL, show_default=True)(found)


service.add_command(keys)


@service.command("instances")
@_remote
def instances_command(admin: _Admin) -> None:
    """List the instances and their states."""
    from rich.console import Console
    from rich.table import Table

    table = Table("name", "state", "since", "in flight", "tokens", "continues", "models", "reason")
    found = admin.ask("GET", "/v1/instances")
    for one in found["instances"]:
        table.add_row(
            one["name"],
            one["state"],
            f"{one['state_age_s']:.0f} s",
            str(one["in_flight"]),
            str(one["outstanding_tokens"]),
            one["continues"],
            ", ".join(one["models"]),
            one["reason"],
        )
    Console().print(table)
    registry = found.get("registry", {})
    if registry.get("state") == "away":
        click.echo(f"etcd is away; this is what was known last. {registry['problem']}", err=True)


@service.command("drain")
@click.argument("name")
@_remote
def drain_command(name: str, admin: _Admin) -> None:
    """Send an instance nothing new; what runs there may finish."""
    one = admin.ask("POST", f"/v1/instances/{name}/drain")
    click.echo(f"{name}: {one['state']}, {one['in_flight']} in flight")


@service.command("undrain")
@click.argument("name")
@_remote
def undrain_command(name: str, admin: _Admin) -> None:
    """Take a drain back."""
    one = admin.ask("POST", f"/v1/instances/{name}/undrain")
    click.echo(f"{name}: {one['state']}")


@service.command("decisions")
@_remote
def decisions_command(admin: _Admin) -> None:
    """Show the last routing decisions, the newest last."""
    for one in admin.ask("GET", "/v1/decisions")["decisions"]:
        click.echo(
            f"{one['unix_s']:.3f} {one['model'] or '-'} -> {one['instance']} "
            f"({one['policy']}: {one['reason']}; attempt {one['attempt']} of "
            f"{one['num_candidates']} candidates)"
        )


@service.command("dashboard")
@_remote
def dashboard_command(admin: _Admin) -> None:
    """Print the address of the live page, token included: for your browser alone."""
    admin.ask("GET", "/v1/overview")  # it is there, and the token is right
    click.echo(f"{admin.url.rstrip('/')}/dashboard#{urlencode({'token': admin.token})}")


def _message(reply: httpx.Response) -> str:
    try:
        return str(reply.json()["error"]["message"])
    except (ValueError, KeyError, TypeError):
        return f"answers {reply.status_code}; is this the admin port of a service?"


def _found_token(admin_url: str) -> str:
    from xllm_plugin.service.app import token_path

    given = os.environ.get("XLLM_SERVICE_ADMIN__TOKEN")
    if given:
        return given
    url = httpx.URL(admin_url)
    path = token_path(url.port or (443 if url.scheme == "https" else 80))
    try:
        return path.read_text()
    except OSError as error:
        raise MisuseError(
            f"no token: {path} cannot be read ({error.strerror}). Give --token, or run this as "
            "the user of the service."
        ) from error
