"""Progress of long work: tokens done, tokens per second, and a remaining time that counts tokens.

Batches differ in size by an order of magnitude (they are sorted by length), so a remaining time by batches lies.
"""

import math
import shutil
import sys
import time
from collections import deque
from collections.abc import Callable
from types import TracebackType
from typing import Self, TextIO

_WINDOW = 60.0  # seconds: the speed shown is that of the last minute, so that it follows the work
_REFRESH = 0.1  # seconds between two states of the live line
_ERASE = "\r\x1b[2K"


class Progress:
    """A line on stderr: a live one on a terminal, otherwise a plain one every few seconds.

    Args:
        total: Tokens of the whole work.
        label: What is being done, in front of the line.
        done: Tokens done by an earlier run that this one continues; they count as done, and not towards the speed.
        stream: Where to write; by default stderr.
        clock: Seconds, monotonic.
        every: Seconds between two plain lines.
        shared: Adds tokens and rows to counts that several processes keep together, and gives their sums.

    Example:
        >>> with Progress(4096, label="build", stream=sys.stdout) as progress:
        ...     progress.update(tokens=4096, rows=16)
        build: 4,096 tokens, 16 rows in 0s (... tokens/s)
    """

    def __init__(
        self,
        total: int,
        *,
        label: str = "",
        done: int = 0,
        stream: TextIO | None = None,
        clock: Callable[[], float] = time.monotonic,
        every: float = 10.0,
        shared: Callable[[int, int], tuple[int, int]] | None = None,
    ) -> None:
        self.total, self.tokens, self.rows = total, done, 0
        self._done, self._shared = done, shared
        self._label = f"{label}: " if label else ""
        self._stream = sys.stderr if stream is None else stream
        self._live = self._stream.isatty()
        self._clock = clock
        self._pause = _REFRESH if self._live else every
        self._begin = (clock(), done)
        self._seen = deque([self._begin])  # (seconds, tokens), the oldest no younger than the window
        self._shown = self._begin[0]

    def update(self, tokens: int, rows: int = 0) -> None:
        """Count work that is finished.

        Args:
            tokens: Tokens finished since the last call; 0 to show what other processes have done.
            rows: Examples finished since the last call.
        """
        now = self._clock()
        if self._shared is None:
            self.tokens, self.rows = self.tokens + tokens, self.rows + rows
        else:
            counted, self.rows = self._shared(tokens, rows)
            self.tokens = self._done + counted
        self._seen.append((now, self.tokens))
        while len(self._seen) > 2 and self._seen[1][0] <= now - _WINDOW:
            self._seen.popleft()
        if now - self._shown >= self._pause:
            self._shown = now
            self._show(self._state())

    def __enter__(self) -> Self:
        if self._live:
            self._show(self._state())
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is None:
            seconds, tokens = self._clock() - self._begin[0], self.tokens - self._begin[1]
            speed = _speed(tokens, seconds)
            line = f"{tokens:,} tokens, {self.rows:,} rows in {_duration(seconds)} ({speed})"
        else:
            line = f"{self._state()}, stopped"
        self._show(line)
        if self._live:
            self._write("\n")

    def _state(self) -> str:
        (since, before), (now, tokens) = self._seen[0], self._seen[-1]
        share = self.tokens / self.total if self.total else 1.0
        line = f"{self.tokens:,} of {self.total:,} tokens ({math.floor(100 * share)}%), {self.rows:,} rows"
        if tokens == before or now == since:
            return line
        remaining = (self.total - self.tokens) * (now - since) / (tokens - before)
        return f"{line}, {_speed(tokens - before, now - since)}, {_duration(remaining)} remaining"

    def _show(self, line: str) -> None:
        line = self._label + line
        if self._live:
            # A line that wraps cannot be erased.
            self._write(_ERASE + line[: shutil.get_terminal_size().columns - 1])
        else:
            self._write(line + "\n")

    def _write(self, text: str) -> None:
        self._stream.write(text)
        self._stream.flush()


def _speed(tokens: int, seconds: float) -> str:
    return f"{tokens / seconds:,.0f} tokens/s" if seconds > 0 else "- tokens/s"


def _duration(seconds: float) -> str:
    """Format a time in two units: 42s, 5m 12s, 3h 05m, 2d 04h."""
    whole = max(0, round(seconds))
    minutes, hours, days = whole // 60, whole // 3600, whole // 86400
    if days:
        return f"{days}d {hours % 24:02}h"
    if hours:
        return f"{hours}h {minutes % 60:02}m"
    return f"{minutes}m {whole % 60:02}s" if minutes else f"{whole}s"
