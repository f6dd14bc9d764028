"""Draws what ``funcattrib quickstart`` prints: docs/images/quickstart.svg.

python docs/picture.py
"""

import io
import tempfile
from contextlib import redirect_stdout
from pathlib import Path

from rich.console import Console
from rich.text import Text

from funcattrib.cli.main import main

PICTURE = Path(__file__).parent / "images" / "quickstart.svg"

# Rich's own frame asks a server for its font.
FRAME = """<svg xmlns="http://www.w3.org/2000/svg" class="rich-terminal" viewBox="0 0 {width} {height}">
<style>
.{unique_id}-matrix {{ font-family: ui-monospace, SFMono-Regular, Menlo, Consolas, "DejaVu Sans Mono", monospace;
  font-size: {char_height}px; line-height: {line_height}px; font-variant-east-asian: full-width; }}
.{unique_id}-title {{ font-family: ui-sans-serif, system-ui, sans-serif; font-size: 18px; font-weight: bold; }}
{styles}
</style>
<defs>
<clipPath id="{unique_id}-clip-terminal">
<rect x="0" y="0" width="{terminal_width}" height="{terminal_height}"/></clipPath>
{lines}
</defs>
{chrome}
<g transform="translate({terminal_x}, {terminal_y})" clip-path="url(#{unique_id}-clip-terminal)">
{backgrounds}
<g class="{unique_id}-matrix">
{matrix}
</g>
</g>
</svg>
"""


def printed(folder: str) -> str:
    """What the command prints, with the folder that it proposes."""
    with redirect_stdout(io.StringIO()) as out:
        code = main(["quickstart", folder])
    assert code == 0
    return out.getvalue().replace(folder, "runs/facts")


def draw(text: str) -> str:
    """The text as an SVG: headings and the best line bold."""
    console = Console(
        record=True, width=max(map(len, text.splitlines())) + 1, file=io.StringIO(), color_system="truecolor"
    )
    console.print("[bold green]$[/] [bold]funcattrib quickstart[/]")
    for line in text.splitlines():
        style = "bold cyan" if line.startswith("Fact ") else "bold green" if line.startswith("funcattrib  ") else ""
        console.print(Text(line, style=style))
    return console.export_svg(title="funcattrib quickstart", code_format=FRAME, unique_id="quickstart")


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as folder:
        PICTURE.write_text(draw(printed(f"{folder}/facts")), encoding="utf-8")
    print(PICTURE)
