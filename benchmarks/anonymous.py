"""Memory of a process's own: what belongs to no file that it maps."""

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def most_memory() -> Iterator[list[int]]:
    """Anonymous memory of this process, the most of it in the block more than at its begin, in bytes."""
    start, most, done = anonymous(), [0], threading.Event()

    def look() -> None:
        while not done.wait(0.001):
            most[0] = max(most[0], anonymous() - start)

    watch = threading.Thread(target=look)
    watch.start()
    try:
        yield most
    finally:
        done.set()
        watch.join()


def anonymous() -> int:
    """Bytes that belong to no file: mapped pages of a checkpoint are the system's to drop."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * int(next(line.split()[1] for line in lines if line.startswith("RssAnon")))
