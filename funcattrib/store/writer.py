"""The writer of a store: shards handed over are written by one thread, while the next are computed."""

import queue
import shutil
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import torch
import yaml
from torch import Tensor

from funcattrib.errors import StoreError
from funcattrib.store import shards
from funcattrib.store.atomic import hash_file, write_file
from funcattrib.store.layout import FileFacts, Shard
from funcattrib.store.lock import Lock
from funcattrib.store.manifest import MANIFEST_FILE, STATE_FILE, Manifest, read_manifest
from funcattrib.store.metadata import Column, to_table
from funcattrib.store.progress_files import FILES as PARTS
from funcattrib.store.tensors import DELAY, save_tensors
from funcattrib.store.write_shard import Job, write_shard
from funcattrib.store.writer_role import WriterRole, kept

STATE = STATE_FILE
PROGRESS = "progress.safetensors"  # what a pass over the data has so far, until it is done
CONFIG = "config.yaml"
FITTING = "fitting"  # folder of the parts of a state that is being put together

_DONE = "done"  # among the tensors in PROGRESS

# Shards that wait while one is written: enough to overlap, and a bound on memory.
_WAITING = 2


class StoreWriter:
    """A writer of the shards of one store; `create_store` makes it. A context manager: leaving it gives up the lock.

    On a store that is complete already nothing is pending, and finishing or saving changes nothing. Several processes
    may write one store, each with its writer (`share_store`): no two write one file.
    """

    def __init__(
        self,
        path: Path,
        manifest: Manifest,
        finished: Mapping[int, Shard],
        lock: Lock | None,
        role: WriterRole = WriterRole(),
    ) -> None:
        self.path = path
        self.manifest = manifest
        self.role = role
        self._open = not manifest.complete
        self._finished = dict(finished)
        self._taken = set(finished)
        self._lock = lock
        self._queue: queue.Queue[Job | None] = queue.Queue(maxsize=_WAITING)
        self._thread: threading.Thread | None = None
        self._failure: BaseException | None = None
        self._reported = False

    @property
    def pending(self) -> list[int]:
        """Return numbers of the shards that were neither written nor handed over yet, in order.

        Of several processes' shards, those that were to be computed when they began.
        """
        todo = range(self.manifest.shard_count) if self.role.todo is None else self.role.todo
        return [i for i in todo if i not in self._taken]

    def claims(self) -> Iterator[int]:
        """Yield numbers of pending shards, each on one of the processes that write the store, whichever asks next.

        SIGTERM waits until the shard in hand is handed over.
        """
        todo = self.pending
        return (todo[number] for number in self.role.world.claims(len(todo)))

    @property
    def finished(self) -> list[int]:
        """Return numbers of the shards that are on disk, in order."""
        return sorted(self._finished)

    @property
    def clipped(self) -> int:
        """Return the entries beyond the stored dtype's range, in the finished shards."""
        return sum(shard.clipped for shard in list(self._finished.values()))

    @property
    def nonfinite(self) -> int:
        """Return the entries that were NaN or infinite, in the finished shards."""
        return sum(shard.nonfinite for shard in list(self._finished.values()))

    def shard_range(self, shard: int) -> range:
        """Return the rows that a shard holds."""
        return self.manifest.shard_range(shard)

    def put(self, shard: int, matrix: Tensor, examples: Mapping[str, Column]) -> None:
        """Hand over a shard to be written; waits while two others are waiting.

        Args:
            shard: a pending one's number.
            matrix: (rows of the shard, D), any float dtype. It now belongs to the writer: do not change it.
            examples: column name -> one entry for every row. The same columns in every shard.

        Raises:
            StoreError: An earlier shard could not be written (a full disk: the store stays valid and can be continued
                by a new writer), the shard is not pending, or the sizes are wrong.
        """
        self._raise_failure()
        span = self.shard_range(shard)
        if not 0 <= shard < self.manifest.shard_count or shard in self._taken:
            raise StoreError(f"expected the number of a pending shard, found {shard}; see `pending`")
        shape = (len(span), self.manifest.width)
        if tuple(matrix.shape) != shape or not matrix.is_floating_point():
            raise StoreError(
                f"expected shard {shard} as floats of shape {shape}, found {matrix.dtype} of {tuple(matrix.shape)}"
            )
        job = Job(shard, matrix.detach().cpu(), to_table(examples, len(span)))
        if not self._open:
            raise StoreError("the writer is closed; make a new one")
        if self._thread is None:
            self._thread = threading.Thread(target=self._work, name="funcattrib-store-writer", daemon=True)
            self._thread.start()
        self._taken.add(shard)
        self._queue.put(job)

    def assign(self, role: WriterRole) -> None:
        """Give the writer its role among the processes that write the store, before a shard is handed over."""
        self.role = role

    def resize(self, rows: int) -> None:
        """Set the number of rows of the store, where that is known only as they come."""
        self.manifest = replace(self.manifest, rows=rows)

    def take(self, shard: int, facts: Shard) -> None:
        """Count a shard whose files another store's writer has made and are in role here."""
        shards.record(self.path, shard, facts)
        self._finished[shard] = facts
        self._taken.add(shard)

    def save_state(self, state: Mapping[str, Tensor]) -> None:
        """Save the chain's fitted state as `state.safetensors`; on a complete store, do nothing."""
        if self._saves:
            save_tensors(self.path / STATE, state)
            self._record_state()
            (self.path / PROGRESS).unlink(missing_ok=True)

    def save_progress(self, tensors: Mapping[str, Tensor], done: int) -> None:
        """Save what unfinished work has so far, to go on with: after `done` passes, or `done` parts of one."""
        if self._saves:
            save_tensors(self.path / PROGRESS, {**tensors, _DONE: torch.tensor(done)}, hashed=True)

    def load_progress(self) -> tuple[dict[str, Tensor], int] | None:
        """Load what `save_progress` kept, the same for all processes; None where there is none."""
        tensors = kept(self.path / PROGRESS, self.role)
        if tensors is None:
            return None
        if _DONE not in tensors:
            raise StoreError(f"{self.path / PROGRESS} is damaged: it does not say what is done; delete it")
        return tensors, int(tensors.pop(_DONE))

    def load_state(self) -> dict[str, Tensor] | None:
        """Load the state that this run or the one it continues has saved, for all processes; None where there is none
        yet.

        It is mapped: read where it is used, and no memory of the process's own.
        """
        state = kept(self.path / STATE, self.role)
        if state is not None and self._saves and self.manifest.state is None:  # this machine's copy, or an older run's
            self._record_state()
        return state

    def save_config(self, config: Mapping[str, Any]) -> None:
        """Save the settings that replay the run as `config.yaml`; on a complete store, do nothing."""
        if self._saves:
            text = yaml.safe_dump(dict(config), sort_keys=False, allow_unicode=True)
            write_file(self.path, CONFIG, lambda sink: sink.write(text.encode()))

    def _record_state(self) -> None:
        """Put the hash of the state into the manifest, so that what happens to the file from now on is noticed."""
        file = self.path / STATE
        facts = FileFacts(STATE, file.stat().st_size, hash_file(file))
        if facts != self.manifest.state:
            self.manifest = replace(self.manifest, state=facts)
            save_manifest(self.path, self.manifest)

    @property
    def _saves(self) -> bool:
        """Return whether this writer saves the files that a store has one of."""
        return self.role.holds_lock and not self.manifest.complete

    def finish(self) -> Manifest:
        """Wait for the last shard, check that all are there, and mark the store complete.

        Of several processes, all call it; where the machines share no folder, each stays a part.

        Raises:
            StoreError: A shard could not be written, or was never handed over.
        """
        if self.manifest.complete:
            return self.manifest
        self._queue.join()
        self._raise_failure()
        world = self.role.world
        world.barrier()
        if any(world.all_gather_object(self.role.part)):
            if self.role.holds_lock and not self.manifest.shard_count:  # a state alone: every machine has it
                self._complete()
            world.barrier()
        else:
            world.on_rank_zero(self._complete)
        self.manifest = read_manifest(self.path)
        return self.manifest

    def _complete(self) -> None:
        """Mark the store complete, once all its shards are on disk."""
        self._collect()
        if missing := sorted(set(range(self.manifest.shard_count)) - self._finished.keys()):
            raise StoreError(
                f"{len(missing)} of {self.manifest.shard_count} shards are not written yet: "
                f"{', '.join(map(str, missing[:5]))}{', …' if missing[5:] else ''}"
            )
        if wrong := shards.misfits(self.path, self._finished):
            raise StoreError(f"{next(iter(wrong.values()))}; run the same command again to write this shard")
        if (self.path / STATE).exists() and self.manifest.state is None:
            self._record_state()
        complete = replace(
            self.manifest,
            shards=[self._finished[i] for i in self.finished],
            complete=True,
            clipped=self.clipped,
            nonfinite=self.nonfinite,
        )
        save_manifest(self.path, complete)
        self.manifest = complete
        for file in (self.path / PROGRESS, *self.path.glob(PARTS)):
            file.unlink(missing_ok=True)
        shutil.rmtree(self.path / FITTING, ignore_errors=True)
        # The manifest lists the shards from here on. Killed before this, a leftover side file is never read again.
        shards.sweep(self.path, keep=[facts.file for shard in complete.shards for facts in shards.files_of(shard)])

    def _collect(self) -> None:
        """Record what the other processes have written; a network file system may show it late."""
        if self.role.world.size == 1:
            return
        until = time.monotonic() + DELAY
        while True:
            self._finished = shards.recorded(self.path, self.manifest)
            late = len(self._finished) < self.manifest.shard_count or shards.misfits(self.path, self._finished)
            if not late or time.monotonic() > until:
                return
            time.sleep(1.0)

    def close(self) -> None:
        """Wait for what was handed over, then give up the lock.

        Raises:
            StoreError: A shard could not be written and no call has said so yet.
        """
        if self._thread is not None:
            self._queue.put(None)
            self._thread.join()
            self._thread = None
        self._open = False
        if self._lock is not None:
            self._lock.release()
            self._lock = None
        if not self._reported:
            self._raise_failure()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is None:
            self.close()
        else:
            with suppress(Exception):  # the error on its way out is the first, and the one to be read
                self.close()

    def _work(self) -> None:
        while self._next():
            pass

    def _next(self) -> bool:
        """Write one shard. A separate function, so that nothing refers to its rows while waiting for the next."""
        job = self._queue.get()
        try:
            if job is not None and self._failure is None:
                self._finished[job.number] = write_shard(self.path, self.manifest, job)
        except BaseException as error:
            self._failure = error
        finally:
            self._queue.task_done()
        return job is not None

    def _raise_failure(self) -> None:
        if self._failure is not None:
            self._reported = True
            raise self._failure


def save_manifest(path: Path, manifest: Manifest) -> None:
    """Replace a store's manifest."""
    write_file(path, MANIFEST_FILE, lambda sink: sink.write(manifest.to_json().encode()))
