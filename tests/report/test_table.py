"""The table a person reads."""

from __future__ import annotations

import io
import random
import sys

import pytest
from rich.cells import cell_len

from funcattrib.report.table import Line, render, window

FILLER = "Many words about nothing in particular, repeated. " * 40
FACT = "Ada Novak lives in Turin and works for the post office."


def test_short_texts_are_shown_whole() -> None:
    shown = render([Line(1, 12.3456, "doc-3", FACT), Line(2, -1e-7, 44, "It rains.")], width=90, color=False)
    assert shown == (
        " rank   score  example  text\n"
        "    1   12.35    doc-3  Ada Novak lives in Turin and works for the post office.\n"
        "    2  -1e-07       44  It rains."
    )


@pytest.mark.parametrize("before", [0, 3, 20, 40])
def test_the_window_shows_what_the_query_shares(before: int) -> None:
    words = FILLER.split()
    cut = before * len(words) // 40
    text = " ".join([*words[:cut], FACT, *words[cut:]])
    (line, more) = render([Line(1, 1.0, 0, text)], query="Where does Ada Novak live?", width=100).split("\n")[1:]
    assert "Ada Novak lives in Turin" in " ".join((line + more).split())
    assert more.endswith("…") == (before < 40)
    assert ("…" in line) == (before > 0)


def test_rare_words_count_for_more_than_common_ones() -> None:
    text = "Novak Novak people are people in town. " + FILLER + "The quince is yellow. " + FILLER
    hits = [Line(1, 1.0, 0, text), Line(2, 1.0, 1, "Novak"), Line(3, 1.0, 2, "Novak town")]
    assert "quince" in render(hits, query="Is a Novak's quince yellow in the town?", width=70)


def test_without_shared_words_the_beginning_is_shown() -> None:
    assert window("one two three four five six", {}, 15) == "one two three…"
    assert window("one two three four five six", {"six": 1.0}, 15) == "…four five six"
    assert window("one two three", {}, 13) == "one two three"
    assert window("x" * 50, {}, 10) == "x" * 9 + "…"


def test_a_query_of_common_words_still_chooses() -> None:
    hits = [Line(1, 1.0, 0, FILLER + "That is who we are. " + FILLER)]
    assert "who we are" in " ".join(render(hits, query="who are we", width=80).split())


def test_words_in_scripts_without_spaces() -> None:
    text = "天地玄黄宇宙洪荒" * 60 + "都灵的邮局" + "日月盈昃辰宿列张" * 60
    assert "都灵" in render([Line(1, 1.0, 0, text)], query="谁住在都灵?", width=60)


@pytest.mark.parametrize("width", [10, 30, 60, 100, 250])
@pytest.mark.parametrize("lines", [1, 2, 3])
def test_no_line_is_wider_than_the_width(width: int, lines: int) -> None:
    generator = random.Random(width)
    pieces = [
        FACT,
        "天地玄黄",
        "\u200b",
        "👩‍🔬 ",
        "e\u0301",
        "x" * 70,
        " ",
        "\t",
        "Ελλάδα ",
        "ไทย",
        "[/red]",
        "\\",
        "—",
    ]
    for _ in range(40):
        text = "".join(generator.choices(pieces, k=generator.choice([0, 3, 60])))
        shown = render([Line(1, 1.5, "id" * 30, text)], query="Ada Turin 天 ไ", width=width, lines=lines, color=False)
        assert len(shown.split("\n")) <= 1 + lines
        assert max(map(cell_len, shown.split("\n"))) <= max(width, 60 if width < 60 else 0)
        assert "\x1b" not in shown


def test_text_prints_as_it_reads() -> None:
    shown = render([Line(1, 1.0, "[red]", "a [bold]b[/bold]\n\n c\x1b[31md\x07 \u202ee \ud83d")], width=80, color=False)
    assert shown.split("\n")[1].split(None, 3)[2:] == ["[red]", "a [bold]b[/bold] c d e \ufffd"]


def test_bold_on_a_terminal_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    hits = [Line(1, 1.0, 0, FACT)]
    assert "\x1b[1mAda\x1b[0m" in render(hits, query="ada?", width=80, color=True)

    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    monkeypatch.delenv("NO_COLOR", raising=False)
    monkeypatch.setattr(sys, "stdout", Terminal())
    assert "\x1b" in render(hits, query="ada", width=80)
    monkeypatch.setenv("NO_COLOR", "1")
    assert "\x1b" not in render(hits, query="ada", width=80)
    monkeypatch.delenv("NO_COLOR")
    monkeypatch.setattr(sys, "stdout", io.StringIO())
    assert "\x1b" not in render(hits, query="ada", width=80)


def test_width_comes_from_the_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "64")
    assert max(map(len, render([Line(1, 1.0, 0, FILLER)]).split("\n"))) <= 64


def test_odd_hits() -> None:
    assert render([]) == "no hits"
    assert "(empty)" in render([Line(1, float("nan"), "", " \n ")], width=80)
    assert "1  " in render([Line(1, float("inf"), 0, "word " * 1_000_000)], query="word", width=80)
