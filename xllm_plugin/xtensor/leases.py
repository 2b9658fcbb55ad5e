"""`PoolMember`: one engine's lease of a pool of memory that engines of one machine share.

The pool is a small file in shared memory, a header and a record a member::

    0        8             64              192
    | magic  | total bytes | record 0      | record 1      | ...

Two kinds of locks, both of the open file (fcntl(2), F_OFD_SETLK): the kernel takes them away with
the process, however it ends.

* Byte 0 is locked by whoever reads or writes more than a hint, for microseconds.
* A member locks the first byte of its record for as long as it lives.  So the lease of a killed
  process is free at once, nobody has to notice its end, and no process number is trusted, which
  another container counts otherwise.

No sum is kept: each figure is one number of eight bytes in the record of its owner, and what is
left is counted anew each time.  A process that is killed in between leaves nothing half done.
"""

from __future__ import annotations

import fcntl
import mmap
import os
import struct
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

from xllm_plugin.errors import ConfigError, NotNowError
from xllm_plugin.xtensor.messages import PoolMemberReport

__all__ = ["MAX_MEMBERS", "Lease", "PoolMember", "fair_shares", "pool_path"]

MAX_MEMBERS = 63
MAGIC = b"xLpool01"
HEADER = struct.Struct("=8sQ")
HEADER_BYTES = 64
RECORD = struct.Struct("=QQQQQQ80s")
FILE_BYTES = HEADER_BYTES + MAX_MEMBERS * RECORD.size
NUMBER_BYTES = 8
SINCE = slice((HEADER_BYTES // NUMBER_BYTES) + 2, None, RECORD.size // NUMBER_BYTES)
FLOCK = struct.Struct("hhqqi0q")  # struct flock of fcntl(2), where off_t has 64 bits


class Lease(NamedTuple):
    """A member's record; sizes in bytes.

    Attributes:
        leased: that the member may use.
        wanted: that its requests can use; it waits for what it misses of that, up to its share.
        since_ns: since when it waits, by CLOCK_MONOTONIC, which all processes share; 0: not at all.
        least: that it never goes below while it lives.
        most: that it never asks for more than.
        pid: of the member, for people to read.
        name: likewise.
    """

    leased: int
    wanted: int
    since_ns: int
    least: int
    most: int
    pid: int
    name: bytes


def fair_shares(total_bytes: int, claims: Sequence[tuple[int, int]]) -> list[int]:
    """What each member may have while all of them want memory.

    Its least, and an equal part of what is left, unless it wants less: others have that then.

    Args:
        total_bytes: no less than all leasts together.
        claims: each member's least, and what it wants.
    """
    found = [least for least, _ in claims]
    extras = [max(0, wanted - least) for least, wanted in claims]
    left = total_bytes - sum(found)
    for rank, at in enumerate(sorted(range(len(claims)), key=extras.__getitem__)):
        part = min(extras[at], left // (len(claims) - rank))
        found[at] += part
        left -= part
    return found


def pool_path(name: str) -> Path:
    """The file of a pool of this user; memory that processes share, empty again after a reboot."""
    return Path(f"/dev/shm/xllm-{os.getuid()}-{name}.pool")  # noqa: S108 - opened with care


class _View(NamedTuple):
    """The pool as one member finds it, in bytes.

    Attributes:
        free: that nobody has leased.
        share: that the member may have while others want memory, too.
        awaited: what others wait for.
        promised: the part of it that others wait for who have waited longer.
    """

    free: int
    share: int
    awaited: int
    promised: int


class PoolMember:
    """Joins a pool at once; a lease it has only from `lease` on.

    Args:
        path: of the pool's file; made if it is not there.
        pool: its name.
        total_bytes: that all members together may use.  Whoever finds the pool without a member
            says so; others say the same or None.
        name: for people, such as the model's.
        least_bytes: that the member can count on once it has leased it.
        most_bytes: that it never asks for more than.
        clock_ns: monotonic, the same for all members.

    Raises:
        ConfigError: the total is not known, or another; the members' minima are more than it; or
            the file is another user's.
        NotNowError: there are too many members.
    """

    def __init__(
        self,
        path: Path,
        *,
        pool: str,
        total_bytes: int | None,
        name: str,
        least_bytes: int,
        most_bytes: int,
        clock_ns: Callable[[], int] = time.monotonic_ns,
    ) -> None:
        self._clock_ns = clock_ns
        self.pool = pool
        self._index = -1
        self._file = _opened(path)
        self._memory = mmap.mmap(self._file, FILE_BYTES)
        self._all_since_ns = memoryview(self._memory).cast("Q")[SINCE]
        try:
            with self._locked():
                self.total_bytes = self._agree(total_bytes)
                self._index = self._join(name, least_bytes, most_bytes)
        except BaseException:  # raised again; the file and its locks are given up first
            self.abandon()
            raise

    @property
    def leased_bytes(self) -> int:
        """What this member may use."""
        return self._record(self._index).leased

    def lease(self, wish_bytes: int, need_bytes: int | None = None, unit_bytes: int = 1) -> int:
        """Have more, or give back.

        What is free goes to those who have waited longer first, as far as their shares go
        (`fair_shares`), then to this member.

        Args:
            wish_bytes: what would be of use; less than there is now gives the rest back.
            need_bytes: that requests can use; as far as it is within the member's share and not
                granted, the member waits for it, and others who hold more than theirs are asked to
                give.  None is as much as the wish.
            unit_bytes: more is granted in multiples of this.

        Returns:
            What the member may use from now on; no less than before, unless it wished for less.

        Raises:
            ValueError: less than the member's least, or more than its most and than it has.
        """
        need_bytes = wish_bytes if need_bytes is None else need_bytes
        with self._locked():
            own = self._record(self._index)._replace(wanted=need_bytes)
            # What it has it may keep for now: its most may have been lowered since.
            if not own.least <= wish_bytes <= max(own.most, own.leased):
                raise ValueError(f"{wish_bytes} bytes are not in {own.least} to {own.most}")
            granted, since_ns = wish_bytes, 0
            if wish_bytes > own.leased or need_bytes > wish_bytes:
                view = self._view(own)
                room = max(0, view.free - view.promised) // unit_bytes * unit_bytes
                granted = min(wish_bytes, own.leased + room)
                share = max(own.least, view.share // unit_bytes * unit_bytes)
                if granted < min(need_bytes, share):
                    since_ns = own.since_ns or self._clock_ns()
            self._write(self._index, own._replace(leased=granted, since_ns=since_ns))
        return granted

    def set_most(self, most_bytes: int) -> None:
        """Never ask for more from now on; what the member has beyond that it may keep."""
        with self._locked():
            own = self._record(self._index)
            self._write(self._index, own._replace(most=min(most_bytes, self.total_bytes)))

    def awaited_bytes(self, need_bytes: int | None = None) -> int:
        """What others wait for, as far as this member has more than its share.

        Two who both miss something of their shares take nothing from each other.

        Args:
            need_bytes: as in `lease`; None is what it was there.
        """
        if not any(self._all_since_ns.tolist()):  # at every step: without the lock
            return 0
        with self._locked():
            own = self._record(self._index)
            if need_bytes is not None:
                own = own._replace(wanted=need_bytes)
            view = self._view(own)
            return min(view.awaited, max(0, own.leased - view.share))

    def members(self) -> tuple[PoolMemberReport, ...]:
        """Everybody who lives, this member included."""
        with self._locked():
            living = [lease for _, lease in self._living()]
            return tuple(
                PoolMemberReport(
                    name=lease.name.rstrip(b"\0").decode(errors="replace"),
                    pid=lease.pid,
                    leased_bytes=lease.leased,
                    unmet_bytes=_unmet(lease, share),
                    min_bytes=lease.least,
                    max_bytes=lease.most,
                )
                for lease, share in zip(living, self._shares(living), strict=True)
            )

    def leave(self) -> None:
        """Give everything back, and the place."""
        if self._file < 0:
            return
        with self._locked():
            self._clear(self._index)
        # A child of this process may have inherited the file: the lock would live with it.
        _lock(self._file, fcntl.F_UNLCK, _place(self._index))
        self.abandon()

    def abandon(self) -> None:
        """Close the file and write nothing, as the kernel does when the process is killed."""
        self._all_since_ns.release()
        self._memory.close()
        os.close(self._file)
        self._file = -1

    # Inside, with byte 0 locked

    def _agree(self, total_bytes: int | None) -> int:
        magic, found = HEADER.unpack_from(self._memory)
        members = [lease.name.rstrip(b"\0").decode(errors="replace") for _, lease in self._living()]
        if magic == MAGIC and members:
            if total_bytes in {None, found}:
                return int(found)
            raise ConfigError(
                f"xtensor.pool_bytes={total_bytes}: the pool {self.pool} has {found} bytes, by "
                f"{', '.join(members)}. Give {found}, or leave it out."
            )
        if total_bytes is None:
            raise ConfigError(
                f"xtensor.pool_bytes is not set, and nobody has the pool {self.pool} yet. "
                "Give the bytes that its members share."
            )
        HEADER.pack_into(self._memory, 0, MAGIC, total_bytes)
        return total_bytes

    def _join(self, name: str, least_bytes: int, most_bytes: int) -> int:
        taken = sum(lease.least for _, lease in self._living())
        if taken + least_bytes > self.total_bytes:
            raise ConfigError(
                f"a minimum of {least_bytes} bytes (xtensor.min_bytes, or one request of full "
                f"length) does not fit into the pool {self.pool} of {self.total_bytes} bytes, "
                f"of which other members' minima are {taken}. Give it "
                f"{taken + least_bytes} or more (xtensor.pool_bytes, once all have left), or "
                "lower --max-model-len."
            )
        for index in range(MAX_MEMBERS):
            if not self._is_alive(index) and _lock(self._file, fcntl.F_WRLCK, _place(index)):
                self._clear(index)
                most = min(most_bytes, self.total_bytes)
                label = name.encode(errors="replace")[:80]
                self._write(index, Lease(0, 0, 0, least_bytes, most, os.getpid(), label))
                return index
        raise NotNowError(
            f"the pool {self.pool} has {MAX_MEMBERS} members; try again when one has left."
        )

    def _view(self, own: Lease) -> _View:
        living = dict(self._living()) | {self._index: own}
        shares = dict(zip(living, self._shares(living.values()), strict=True))
        unmet = {
            index: _unmet(lease, shares[index])
            for index, lease in living.items()
            if index != self._index
        }
        return _View(
            free=self.total_bytes - sum(lease.leased for lease in living.values()),
            share=shares[self._index],
            awaited=sum(unmet.values()),
            promised=sum(
                misses for index, misses in unmet.items() if _is_before(living[index], own)
            ),
        )

    def _shares(self, leases: Iterable[Lease]) -> list[int]:
        return fair_shares(self.total_bytes, [(lease.least, lease.wanted) for lease in leases])

    def _living(self) -> Iterator[tuple[int, Lease]]:
        for index in range(MAX_MEMBERS):
            record = self._record(index)
            if not record.pid:
                continue
            if self._is_alive(index):
                yield index, record
            else:
                self._clear(index)

    def _is_alive(self, index: int) -> bool:
        """Whether somebody holds the record's lock; to its holder it would seem free."""
        return index == self._index or _is_locked(self._file, _place(index))

    def _record(self, index: int) -> Lease:
        return Lease._make(RECORD.unpack_from(self._memory, _place(index)))

    def _write(self, index: int, record: Lease) -> None:
        RECORD.pack_into(self._memory, _place(index), *record)

    def _clear(self, index: int) -> None:
        self._write(index, Lease(0, 0, 0, 0, 0, 0, b""))

    @contextmanager
    def _locked(self) -> Iterator[None]:
        fcntl.fcntl(self._file, fcntl.F_OFD_SETLKW, _flock(fcntl.F_WRLCK, 0))
        try:
            yield
        finally:
            fcntl.fcntl(self._file, fcntl.F_OFD_SETLK, _flock(fcntl.F_UNLCK, 0))


def _opened(path: Path) -> int:
    try:
        file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
    except OSError as error:
        raise ConfigError(
            f"the pool's file {path} cannot be opened ({error.strerror}). Choose another name in "
            "xtensor.pool, or remove what is there."
        ) from error
    if os.fstat(file).st_uid != os.getuid():
        os.close(file)
        raise ConfigError(f"{path} is another user's; choose another name in xtensor.pool.")
    os.ftruncate(file, FILE_BYTES)
    return file


def _unmet(lease: Lease, share_bytes: int) -> int:
    """What a member waits for."""
    return max(0, share_bytes - lease.leased) if lease.since_ns else 0


def _is_before(other: Lease, own: Lease) -> bool:
    """Whether another record's member has waited for longer; one's own record never has."""
    return bool(other.since_ns) and (not own.since_ns or other.since_ns < own.since_ns)


def _place(index: int) -> int:
    return HEADER_BYTES + index * RECORD.size


def _flock(kind: int, at: int) -> bytes:
    return FLOCK.pack(kind, os.SEEK_SET, at, 1, 0)


def _lock(file: int, kind: int, at: int) -> bool:
    try:
        fcntl.fcntl(file, fcntl.F_OFD_SETLK, _flock(kind, at))
    except BlockingIOError:
        return False
    return True


def _is_locked(file: int, at: int) -> bool:
    """Whether another opening of the file holds the byte."""
    found = fcntl.fcntl(file, fcntl.F_OFD_GETLK, _flock(fcntl.F_WRLCK, at))
    return int(FLOCK.unpack(found)[0]) != fcntl.F_UNLCK
