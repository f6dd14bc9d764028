"""Progress with a clock and streams of our own."""

import io
from collections.abc import Callable

import pytest

from funcattrib.runtime.progress import Progress, _duration


class Clock:
    now = 100.0

    def __call__(self) -> float:
        return self.now


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def work(clock: Clock) -> Callable[..., None]:
    def work(progress: Progress, seconds: float, tokens: int, rows: int = 1) -> None:
        clock.now += seconds
        progress.update(tokens, rows)

    return work


def test_plain_lines_come_every_few_seconds(clock, work):
    out = io.StringIO()
    with Progress(10_000, label="build", stream=out, clock=clock, every=10) as progress:
        for _ in range(5):
            work(progress, seconds=6, tokens=600)
    assert out.getvalue().splitlines() == [
        "build: 1,200 of 10,000 tokens (12%), 2 rows, 100 tokens/s, 1m 28s remaining",
        "build: 2,400 of 10,000 tokens (24%), 4 rows, 100 tokens/s, 1m 16s remaining",
        "build: 3,000 tokens, 5 rows in 30s (100 tokens/s)",
    ]


def test_remaining_time_counts_tokens_not_batches(clock, work):
    # Half of the batches (one of two) but nine tenths of the tokens: a tenth of the time remains.
    out = io.StringIO()
    progress = Progress(1000, stream=out, clock=clock, every=1)
    work(progress, seconds=90, tokens=900)
    assert "(90%)" in out.getvalue()
    assert out.getvalue().endswith("10 tokens/s, 10s remaining\n")


def test_remaining_time_follows_the_last_minute(clock, work):
    out = io.StringIO()
    progress = Progress(1_000_000, stream=out, clock=clock, every=1)
    for _ in range(60):
        work(progress, seconds=10, tokens=10_000)  # 1,000 tokens/s for ten minutes
    for _ in range(60):
        work(progress, seconds=10, tokens=1_000)  # then another program takes the processor
    assert out.getvalue().endswith("(66%), 120 rows, 100 tokens/s, 56m 40s remaining\n")
    assert len(progress._seen) < 10


def test_a_continued_run_does_not_count_old_work_as_speed(clock, work):
    out = io.StringIO()
    with Progress(2000, done=1000, stream=out, clock=clock, every=1) as progress:
        work(progress, seconds=10, tokens=500)
        assert out.getvalue() == "1,500 of 2,000 tokens (75%), 1 rows, 50 tokens/s, 10s remaining\n"
        work(progress, seconds=10, tokens=500)
    assert out.getvalue().splitlines()[-1] == "1,000 tokens, 2 rows in 20s (50 tokens/s)"


def test_terminal_rewrites_one_line(clock, work):
    out = Terminal()
    with Progress(100, stream=out, clock=clock) as progress:
        work(progress, seconds=1, tokens=50)
        work(progress, seconds=0.01, tokens=10)  # too soon to be seen
        work(progress, seconds=1, tokens=40)
    states = out.getvalue().split("\r\x1b[2K")
    assert out.getvalue().count("\n") == 1
    assert out.getvalue().endswith("\n")
    assert [state.split(" tokens")[0] for state in states] == ["", "0 of 100", "50 of 100", "100 of 100", "100"]


def test_terminal_line_never_wraps(clock, work, monkeypatch):
    monkeypatch.setenv("COLUMNS", "30")
    out = Terminal()
    progress = Progress(10**9, label="build", stream=out, clock=clock)
    work(progress, seconds=1, tokens=50)
    assert len(out.getvalue().split("\r\x1b[2K")[-1]) == 29


def test_an_error_ends_the_line_and_passes_on(clock, work):
    out = Terminal()
    with pytest.raises(KeyError), Progress(100, stream=out, clock=clock) as progress:
        work(progress, seconds=1, tokens=50)
        raise KeyError
    assert out.getvalue().endswith("50 of 100 tokens (50%), 1 rows, 50 tokens/s, 1s remaining, stopped\n")


@pytest.mark.parametrize("total", [0, 10])
def test_nothing_done_claims_no_speed(clock, total):
    out = Terminal()
    with Progress(total, stream=out, clock=clock):
        pass
    assert "remaining" not in out.getvalue()
    assert out.getvalue().endswith("0 tokens, 0 rows in 0s (- tokens/s)\n")


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0.4, "0s"), (59.6, "1m 00s"), (312, "5m 12s"), (11_100, "3h 05m"), (187_200, "2d 04h"), (-1, "0s")],
)
def test_duration(seconds, text):
    assert _duration(seconds) == text
