"""One writer at a time: a file in the store names the process that writes it.

A lock outlives a killed process. It is stale, and taken over, when its host is this one and the process it names has
ended (or its number belongs to a later process by now). Whether a process on another host lives cannot be known: its
lock is respected.
"""

import errno
import json
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import NamedTuple

from funcattrib.errors import StoreError
from funcattrib.store.atomic import explain

LOCK_FILE = "lock"


class Owner(NamedTuple):
    """The process that writes: its number, host, when the kernel started it, and when it took the lock (UTC)."""

    pid: int
    host: str
    started: str
    since: str


class Lock(NamedTuple):
    """A lock that is held."""

    path: Path
    owner: Owner

    def release(self) -> None:
        """Release the lock; a forked child that inherited it leaves it to its parent."""
        if os.getpid() != self.owner.pid:
            return
        with suppress(FileNotFoundError), _guarded(self.path, create=False) as descriptor:
            if _read(descriptor) == self.owner:
                self.path.unlink()


def acquire(folder: Path) -> Lock:
    """Take the lock of a store.

    Raises:
        StoreError: A process that lives (or may live) holds it, or the folder is not writable.
    """
    path = folder / LOCK_FILE
    now = datetime.now(UTC).isoformat(timespec="seconds")
    mine = Owner(os.getpid(), socket.gethostname(), _started(os.getpid()) or "", now)
    try:
        with _guarded(path, create=True) as descriptor:
            owner = _read(descriptor)
            if owner and _may_live(owner):
                raise StoreError(_held(folder, owner))
            os.ftruncate(descriptor, 0)
            os.pwrite(descriptor, json.dumps(mine._asdict()).encode(), 0)
    except OSError as error:
        raise StoreError(explain(error, path)) from error
    return Lock(path, mine)


def _held(folder: Path, owner: Owner) -> str:
    whom = "this process" if owner.pid == os.getpid() else f"process {owner.pid}"
    remedy = "close it first" if owner.pid == os.getpid() else "wait for it, or end it and run the same command again"
    if owner.host != socket.gethostname():
        remedy = f"wait for it, or delete {folder / LOCK_FILE} if that process is gone"
    return f"{folder} is being written by {whom} on {owner.host} (since {owner.since})\n{remedy}"


@contextmanager
def _guarded(path: Path, *, create: bool) -> Iterator[int]:
    """Open the lock file while no one else looks at it or changes it (where the file system can promise that)."""
    import fcntl  # POSIX alone has it; reading a store needs none of this

    while True:
        descriptor = os.open(path, os.O_RDWR | (os.O_CREAT if create else 0), 0o644)
        try:
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX)
            except OSError as error:
                if error.errno not in (errno.ENOTSUP, errno.ENOSYS, errno.ENOLCK):
                    raise
            try:
                same = os.path.samestat(os.fstat(descriptor), os.stat(path))
            except FileNotFoundError:
                same = False
            if same:  # otherwise its owner removed it while we waited: open the new one
                yield descriptor
                return
        finally:
            os.close(descriptor)


def _read(descriptor: int) -> Owner | None:
    """Read the owner, or None for a lock that was never written whole: its writer died in the middle."""
    try:
        values = json.loads(os.pread(descriptor, 4096, 0))
        return Owner(int(values["pid"]), str(values["host"]), str(values["started"]), str(values["since"]))
    except (ValueError, KeyError, TypeError):
        return None


def _may_live(owner: Owner) -> bool:
    if owner.host != socket.gethostname():
        return True
    try:
        os.kill(owner.pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass  # it lives, under another user
    started = _started(owner.pid)
    return started is None or started == owner.started


def _started(pid: int) -> str | None:
    """Return boot and clock tick at which a process started: with its number, a name no other process has. None:
    unknown.

    Empty for a process that has ended and was not yet reaped by its parent.
    """
    try:
        # The second field, the program's name in brackets, may hold anything; the rest follows the last bracket.
        state, *rest = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    except OSError:
        return None
    return "" if state in "ZX" else f"{boot}:{rest[18]}"
