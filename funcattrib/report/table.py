"""A query's hits as a table for people: rank, score, example, and the part of its text that matters.

Of a long text the window is shown that shares the most words with the query. A word that few of the hits contain
counts for more than one that is in all of them.
"""

from __future__ import annotations

import os
import re
import shutil
import sys
from collections import Counter
from collections.abc import Sequence
from io import StringIO
from typing import NamedTuple

from funcattrib.query.hits import Hit

# A script without spaces (kana, Chinese characters, Hangul, Thai) is compared by its single characters.
_DENSE = "\u0e00-\u0e7f\u3040-\u30ff\u3400-\u9fff\uac00-\ud7af"
_TERM = re.compile(rf"[{_DENSE}]|[^\W{_DENSE}]+(?:['’][^\W{_DENSE}]+)*")
_UNPRINTABLE = re.compile(r"(?:\x1b\[[0-9;?]*[ -/]*[@-~]|[\x00-\x1f\x7f-\x9f\u200e\u200f\u202a-\u202e\u2066-\u2069])+")
_SURROGATE = re.compile(r"[\ud800-\udfff]")  # half a character, which no terminal can be sent
_COMMON = frozenset(
    _TERM.findall(
        "a an and are as at be been but by did do does for from had has have he her his how i in is it its not of on "
        "or she that the their them they this to was we were what when where which who why will with you"
    )
)
_LEAST_TEXT = 20  # columns that a text needs to say anything
_MOST_READ = 100_000  # characters of one text that are searched


class Line(NamedTuple):
    """One line of the table.

    rank: from 1; score: in the units of the search; example: what the reader knows it by; text: of any length; further:
    shown before the text.
    """

    rank: int
    score: float
    example: str | int
    text: str
    further: str = ""


def render(
    hits: Sequence[Line], *, query: str = "", width: int | None = None, color: bool | None = None, lines: int = 2
) -> str:
    """Format the hits as a table.

    Args:
        hits: in the order to show.
        query: the text that was asked about: its words choose what is shown of a long text, and are bold on a terminal.
        width: columns; by default the terminal's, or 100 where there is none.
        color: bold and dim type; by default where stdout is a terminal and NO_COLOR is not set.
        lines: lines of text for one hit.

    Returns:
        Lines no wider than `width`, without a newline at the end.

    Example:
        >>> print(render([Line(1, 0.5, 7, "Ada lives in Turin."), Line(2, -0.25, 12, "It rains.")], width=60))
         rank   score  example  text
            1     0.5        7  Ada lives in Turin.
            2   -0.25       12  It rains.
    """
    from rich.cells import cell_len  # a tenth of a second, and not every command shows a table
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    if width is None:
        width = shutil.get_terminal_size((100, 24)).columns
    if color is None:
        color = sys.stdout.isatty() and "NO_COLOR" not in os.environ
    if not hits:
        return "no hits"
    scores = [f"{hit.score:.4g}" for hit in hits]
    examples = [_shorten(_clean(str(hit.example)), max(8, width // 4)) for hit in hits]
    texts = [_clean(hit.text) for hit in hits]
    weights = _weights(query, texts)
    taken = sum(max(map(cell_len, column)) + 2 for column in (["rank"], ["score", *scores], ["example", *examples])) + 2
    room = max(_LEAST_TEXT, width - taken)

    output = StringIO()
    console = Console(
        file=output,
        width=max(width, taken + _LEAST_TEXT),
        force_terminal=color,
        color_system="standard" if color else None,
    )
    table = Table(box=None, padding=(0, 1), pad_edge=True, header_style="dim")
    table.add_column("rank", justify="right", no_wrap=True)
    table.add_column("score", justify="right", no_wrap=True)
    table.add_column("example", justify="right", no_wrap=True)
    table.add_column("text", overflow="fold", min_width=_LEAST_TEXT)
    for hit, score, example, text in zip(hits, scores, examples, texts, strict=True):
        further = _shorten(_clean(hit.further), room * lines // 2)
        further += " " if further else ""
        columns = room * lines - cell_len(further)
        excerpt = Text(further + (window(text, weights, columns) or "(empty)"))
        while len(excerpt.wrap(console, room)) > lines:  # lines break at spaces, so some room stays empty at their ends
            columns -= 4
            excerpt = Text(further + window(text, weights, columns))
        for match in _TERM.finditer(excerpt.plain):
            if match.group().casefold() in weights:
                excerpt.stylize("bold", *match.span())
        table.add_row(str(hit.rank), Text(score), Text(example), excerpt)
    console.print(table)
    return "\n".join(line.rstrip() for line in output.getvalue().rstrip("\n").split("\n"))


def window(text: str, weights: dict[str, float], columns: int) -> str:
    """Return the stretch of `text`, at most `columns` wide on a terminal, whose distinct words weigh the most.

    Cut at words where there are any, with "…" where something is left out; of equal stretches, the first.

    Args:
        text: one line.
        weights: word (case-folded) -> weight.
        columns: 3 or more; a Chinese character takes two.
    """
    from rich.cells import cell_len

    if cell_len(text[: columns + 1]) <= columns and len(text) <= columns:
        return text
    found = [match for match in _TERM.finditer(text[:_MOST_READ]) if match.group().casefold() in weights]
    # Two columns for the ellipses. Where all characters are wide, half as many fit.
    reach = (columns - 2) * min(len(text), _MOST_READ) // max(1, cell_len(text[:_MOST_READ]))
    begin = end = first = 0
    best, weight, inside = 0.0, 0.0, Counter[str]()
    for last, match in enumerate(found):
        term = match.group().casefold()
        weight += weights[term] if not inside[term] else 0.0
        inside[term] += 1
        while match.end() - found[first].start() > reach and first < last:
            gone = found[first].group().casefold()
            inside[gone] -= 1
            weight -= weights[gone] if not inside[gone] else 0.0
            first += 1
        if weight > best + 1e-9:
            best, begin, end = weight, found[first].start(), match.end()
    if end <= reach:  # what matters is at the beginning
        return _shorten(text, columns)
    begin = max(0, begin - (reach - (end - begin)) // 2)  # in the middle of its surroundings
    begin = max(1, min(begin, len(text) - reach))
    at = text.find(" ", begin - 1, begin + 25)  # not in the middle of a word
    if at >= 0:
        begin = at + 1
    return "…" + _shorten(text[begin:], columns - 1)


def _shorten(text: str, columns: int) -> str:
    """Return the beginning of `text`, at most `columns` wide, with "…" where something is left out."""
    from rich.cells import cell_len, set_cell_size

    if cell_len(text[: columns + 1]) <= columns and len(text) <= columns:
        return text
    cut = set_cell_size(text[:columns], columns - 1).rstrip()
    space = cut.rfind(" ")
    if space > len(cut) - 25 and space > 0 and not text[len(cut) : len(cut) + 1].isspace():
        cut = cut[:space]
    return cut.rstrip(" ,;:–-") + "…"


def _weights(query: str, texts: Sequence[str]) -> dict[str, float]:
    """Weigh the query's words by how much each tells the texts apart; common words only if there are no others."""
    terms = {match.group().casefold() for match in _TERM.finditer(_clean(query))}
    terms = (terms - _COMMON) or terms
    holding = Counter(
        term for text in texts for term in {m.group().casefold() for m in _TERM.finditer(text[:_MOST_READ])} & terms
    )
    return {term: 1.0 / (1 + holding[term]) for term in terms}


def _clean(text: str) -> str:
    """Return one line that prints as it reads: no line breaks, control characters or changes of direction."""
    return " ".join(_UNPRINTABLE.sub(" ", _SURROGATE.sub("\ufffd", text)).split())


def hits_table(hits: Sequence[Hit], query: str, *, width: int | None = None, kept: Sequence[str] = ()) -> str:
    """Format rank, score, example id and text, each text cut around what it shares with ``query``.

    A last line says how many examples are left out because they have the text of one that is shown.

    Args:
        kept: further columns of the examples to show before the text.
    """
    lines = [
        Line(hit.rank, hit.score, str(hit.example.get("id", hit.row)), hit.text, _further(hit, kept)) for hit in hits
    ]
    shown = render(lines, query=query, width=width)
    copies = sum(hit.copies for hit in hits)
    note = f"left out: {copies:,} example{'' if copies == 1 else 's'} with a text that is shown"
    return f"{shown}\n{note}" if copies else shown


def _further(hit: Hit, names: Sequence[str]) -> str:
    """Return the columns beside the text as a prefix of it: ``[url=…, label=3]``."""
    found = {name: hit.example[name] for name in names if name in hit.example}
    return f"[{', '.join(f'{name}={value}' for name, value in found.items())}]" if found else ""
