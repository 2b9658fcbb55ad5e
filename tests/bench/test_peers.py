"""Peer command lines are what the design says, word by word."""

from __future__ import annotations

import sys

import pytest

from xllm_plugin.bench.peers import COMMON_ENVIRONMENT, peer_servers, xllm_server
from xllm_plugin.errors import ConfigError

FLAGS = ("--max-model-len", "2048")
WHERE = ("--host", "127.0.0.1", "--port", "8123", *FLAGS)
STOCK = (sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", "/m/tiny", *WHERE)
NATIVE = {"XLLM_PLATFORM": "native", **COMMON_ENVIRONMENT}


def test_the_four_peers() -> None:
    stock, stock_2t, best, xllm = peer_servers("/m/tiny", port=8123, flags=FLAGS, cores=[0, 1])
    assert (stock.command, stock.environment) == (STOCK, NATIVE)
    assert stock_2t.command == STOCK
    assert stock_2t.environment == {**NATIVE, "VLLM_CPU_OMP_THREADS_BIND": "0-1"}
    assert best.command == (*STOCK, "--distributed-executor-backend", "uni")
    assert best.environment == {
        **stock_2t.environment,
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
        "OMP_NUM_THREADS": "2",
    }
    assert xllm.command == (sys.executable, "-m", "xllm_plugin.cli", "serve", "/m/tiny", *WHERE)
    assert xllm.environment == COMMON_ENVIRONMENT


def test_names_choose_and_order() -> None:
    peers = peer_servers("/m", port=1, names=("xllm", "stock"))
    assert [peer.name for peer in peers] == ["xllm", "stock"]


@pytest.mark.parametrize("names", [("fast",), ()])
def test_unknown_names_are_refused(names: tuple[str, ...]) -> None:
    with pytest.raises(ConfigError, match="choose from stock, stock-2t, stock-best, xllm"):
        peer_servers("/m", port=1, names=names)


def test_scattered_cores_are_listed() -> None:
    (peer,) = peer_servers("/m", port=1, names=("stock-2t",), cores=[5, 0, 2])
    assert peer.environment["VLLM_CPU_OMP_THREADS_BIND"] == "0,2,5"


def test_a_record_shows_no_path_of_this_disk() -> None:
    (peer,) = peer_servers("/some/where/tiny", port=8123, names=("stock",))
    record = peer.record("/some/where/tiny")
    assert record.command[:5] == (
        "python", "-m", "vllm.entrypoints.openai.api_server", "--model", "tiny",
    )  # fmt: skip
    assert record.environment == NATIVE


def test_a_changed_peer_keeps_what_it_had() -> None:
    (base,) = peer_servers("/m", port=1, flags=FLAGS, names=("xllm",))
    changed = base.changed("other", "what", flags=("--more",), environment={"A": "1"})
    assert changed.command == (*base.command, "--more")
    assert changed.environment == {**COMMON_ENVIRONMENT, "A": "1"}
    assert (changed.name, changed.what, changed.port) == ("other", "what", 1)
    assert base.environment == COMMON_ENVIRONMENT


def test_our_servers_have_ports_of_their_own() -> None:
    one, two = (xllm_server("/m", name, "what", flags=FLAGS) for name in ("one", "two"))
    assert one.port != two.port
    assert one.command[-2:] == FLAGS
