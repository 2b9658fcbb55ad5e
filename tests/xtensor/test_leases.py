"""Members of a pool never have more than it together, whoever comes, waits or dies."""

from __future__ import annotations

import signal
import subprocess
import sys
from itertools import takewhile
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from xllm_plugin.errors import ConfigError, NotNowError
from xllm_plugin.xtensor.leases import MAX_MEMBERS, PoolMember, fair_shares

TOTAL = 100


class Clock:
    """Counts the calls, so that no two moments are the same."""

    def __init__(self) -> None:
        self.now_ns = 0

    def __call__(self) -> int:
        self.now_ns += 1
        return self.now_ns


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "p.pool"


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def join(path: Path, clock: Clock) -> Any:
    members: list[PoolMember] = []

    def made(name: str = "model", least: int = 10, **changes: Any) -> PoolMember:
        arguments = {"total_bytes": TOTAL, "most_bytes": TOTAL, **changes}
        members.append(
            PoolMember(path, pool="p", name=name, least_bytes=least, clock_ns=clock, **arguments)
        )
        return members[-1]

    yield made
    for member in members:
        member.leave()


class PoolMachine(RuleBasedStateMachine):
    """Several members in one process: locks belong to an opened file, not to a process."""

    def __init__(self) -> None:
        super().__init__()
        self.folder = TemporaryDirectory()
        self.path = Path(self.folder.name) / "p.pool"
        self.clock = Clock()
        self.members: list[PoolMember] = []
        self.least: dict[PoolMember, int] = {}
        self.leased: dict[PoolMember, int] = {}
        self.wanted: dict[PoolMember, int] = {}
        self.waiting: list[PoolMember] = []  # the longest first

    @rule(least=st.integers(1, 60))
    def join(self, least: int) -> None:
        def attempt() -> PoolMember:
            return PoolMember(
                self.path,
                pool="p",
                total_bytes=TOTAL,
                name="model",
                least_bytes=least,
                most_bytes=TOTAL,
                clock_ns=self.clock,
            )

        if sum(self.least.values()) + least > TOTAL:
            with pytest.raises(ConfigError, match="minima"):
                attempt()
            return
        member = attempt()
        self.members.append(member)
        self.least[member] = least
        self.leased[member] = self.wanted[member] = 0

    @precondition(lambda self: self.members)
    @rule(data=st.data(), unit=st.integers(1, 7))
    def lease(self, data: st.DataObject, unit: int) -> None:
        member = data.draw(st.sampled_from(self.members))
        least = self.least[member]
        wish = data.draw(st.integers(least, TOTAL))
        need = self.wanted[member] = data.draw(st.integers(least, TOTAL))
        before, free = self.leased[member], TOTAL - sum(self.leased.values())
        members = sorted(self.members, key=lambda one: one._index)
        claims = [(self.least[one], self.wanted[one]) for one in members]
        shares = dict(zip(members, fair_shares(TOTAL, claims), strict=True))
        unmet = [(one, max(0, shares[one] - self.leased[one])) for one in self.waiting]
        awaited = sum(misses for one, misses in unmet if one is not member)
        assert member.awaited_bytes(need) == min(awaited, max(0, before - shares[member]))
        granted = member.lease(wish, need, unit)
        promised = sum(misses for _, misses in takewhile(lambda has: has[0] is not member, unmet))
        room = max(0, free - promised) // unit * unit
        assert granted == (min(wish, before + room) if wish > before else wish)
        self.leased[member] = granted
        is_met = granted >= min(need, max(least, shares[member] // unit * unit))
        if is_met or member not in self.waiting:
            self.waiting = [one for one in self.waiting if one is not member]
            self.waiting += [] if is_met else [member]

    @precondition(lambda self: self.members)
    @rule(data=st.data(), is_killed=st.booleans())
    def go(self, data: st.DataObject, is_killed: bool) -> None:
        member = data.draw(st.sampled_from(self.members))
        if is_killed:
            member.abandon()
        else:
            member.leave()
        self.members.remove(member)
        del self.least[member], self.leased[member], self.wanted[member]
        self.waiting = [one for one in self.waiting if one is not member]

    @invariant()
    def the_pool_is_never_overdrawn(self) -> None:
        assert sum(self.leased.values()) <= TOTAL
        for member in self.members:
            assert member.leased_bytes == self.leased[member]
        if self.members:
            found = self.members[0].members()
            assert sorted(m.leased_bytes for m in found) == sorted(self.leased.values())

    def teardown(self) -> None:
        """When all others are gone, one can have everything."""
        for member in self.members[1:]:
            member.abandon()
        if self.members:
            assert self.members[0].lease(TOTAL) == TOTAL
            self.members[0].leave()
        self.folder.cleanup()


PoolMachine.TestCase.settings = settings(max_examples=40, stateful_step_count=30, deadline=None)
TestPool = PoolMachine.TestCase


def test_who_waited_longer_comes_first(join: Any) -> None:
    holder, first, second = join("holder"), join("first"), join("second")
    assert holder.lease(80) == 80
    assert first.lease(40) == 20
    assert second.lease(10) == 0
    assert holder.awaited_bytes() == 30
    assert first.awaited_bytes() == second.awaited_bytes() == 0, "they have nothing to give"
    assert holder.lease(55) == 55
    assert second.lease(10) == 5, "20 of the 25 are the first's"
    assert first.lease(40) == 40
    assert second.lease(10) == 5
    assert holder.lease(50) == 50
    assert second.lease(10) == 10
    assert holder.awaited_bytes() == 0


def test_a_wish_beyond_need_is_no_reason_to_wait(join: Any) -> None:
    holder, other = join(), join()
    holder.lease(70)
    assert other.lease(60, need_bytes=30) == 30
    assert holder.awaited_bytes() == 0
    assert other.lease(60, need_bytes=31) == 30
    assert holder.awaited_bytes() == 1
    assert other.lease(60, need_bytes=20) == 30
    assert holder.awaited_bytes() == 0, "it waits no more"


def test_two_that_want_all_come_to_half_and_take_nothing_from_each_other(join: Any) -> None:
    first, second = join(), join()
    assert first.lease(90) == 90
    assert second.lease(100) == 10
    assert [member.unmet_bytes for member in first.members()] == [0, 40]
    assert first.awaited_bytes(90) == 40
    assert first.lease(50, need_bytes=90) == 50
    assert second.lease(100) == 50
    assert first.awaited_bytes(90) == second.awaited_bytes(100) == 0
    assert [member.unmet_bytes for member in first.members()] == [0, 0]


@given(
    claims=st.lists(st.tuples(st.integers(0, 30), st.integers(0, 200)), min_size=1, max_size=6),
    left=st.integers(0, 200),
)
def test_shares_are_equal_beyond_the_least_unless_somebody_wants_less(
    claims: list[tuple[int, int]], left: int
) -> None:
    total = left + sum(least for least, _ in claims)
    shares = fair_shares(total, claims)
    assert sum(shares) <= total
    extras = [share - least for share, (least, _) in zip(shares, claims, strict=True)]
    assert min(extras) >= 0
    short = [
        extra
        for share, extra, (_, wanted) in zip(shares, extras, claims, strict=True)
        if share < wanted
    ]
    assert all(share <= max(claim) for share, claim in zip(shares, claims, strict=True))
    if short:
        assert sum(shares) == total, "somebody misses what nobody has"
        assert max(extras) - min(short) <= 1


def test_what_a_member_has_beyond_a_lower_most_goes_when_it_can(join: Any) -> None:
    member = join()
    assert member.lease(60) == 60
    member.set_most(30)
    assert member.lease(60, need_bytes=30) == 60
    with pytest.raises(ValueError, match="61 bytes are not in 10 to 30"):
        member.lease(61)
    assert member.lease(30) == 30
    with pytest.raises(ValueError, match="31 bytes"):
        member.lease(31)
    member.set_most(40)
    assert member.lease(40) == 40
    assert member.members()[0].max_bytes == 40


def test_members_agree_on_the_total(join: Any) -> None:
    first = join()
    assert join(total_bytes=None).total_bytes == TOTAL
    with pytest.raises(ConfigError, match=r"pool_bytes=99: the pool p has 100 bytes.*Give 100"):
        join(total_bytes=99)
    assert first.total_bytes == TOTAL


def test_the_first_member_says_the_total(join: Any) -> None:
    with pytest.raises(ConfigError, match="nobody has the pool p yet"):
        join(total_bytes=None)
    member = join(total_bytes=77)
    member.leave()
    assert join(total_bytes=78).total_bytes == 78, "of an empty pool nothing is left"


def test_a_minimum_that_does_not_fit_is_refused_with_what_would(join: Any) -> None:
    join(least=70)
    with pytest.raises(ConfigError, match=r"minimum of 40 .* are 70.*Give it 110 or more"):
        join(least=40)


def test_a_full_pool_of_members_is_not_now(path: Path) -> None:
    def member() -> PoolMember:
        return PoolMember(
            path, pool="p", total_bytes=TOTAL, name="m", least_bytes=0, most_bytes=TOTAL
        )

    members = [member() for _ in range(MAX_MEMBERS)]
    with pytest.raises(NotNowError, match="63 members"):
        member()
    members.pop().abandon()
    members.append(member())
    for left in members:
        left.leave()


def test_another_user_s_file_and_a_link_are_refused(tmp_path: Path) -> None:
    target = tmp_path / "elsewhere"
    target.write_text("mine")
    (tmp_path / "p.pool").symlink_to(target)
    with pytest.raises(ConfigError, match="another name"):
        PoolMember(
            tmp_path / "p.pool", pool="p", total_bytes=1, name="m", least_bytes=0, most_bytes=1
        )
    assert target.read_text() == "mine"


OTHER_PROCESS = """
import pathlib, sys
from xllm_plugin.xtensor.leases import PoolMember
path = pathlib.Path(sys.argv[1])
member = PoolMember(
    path, pool="p", total_bytes=None, name="other", least_bytes=10, most_bytes=100
)
print(member.lease(90), flush=True)
sys.stdin.read()
"""


def test_the_lease_of_a_killed_process_is_free_at_once(join: Any, path: Path) -> None:
    member = join()
    member.lease(10)
    other = subprocess.Popen(
        [sys.executable, "-c", OTHER_PROCESS, str(path)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert other.stdout is not None
    with other:
        assert other.stdout.readline() == "90\n"
        assert member.lease(50) == 10
        assert [m.pid for m in member.members()][1:] == [other.pid]
        other.send_signal(signal.SIGKILL)
    assert member.lease(100) == 100
    assert len(member.members()) == 1
