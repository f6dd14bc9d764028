"""What mkdocs is told beside mkdocs.yml: pages made of files outside docs/, and how public names are shown.

A link that leaves docs/, as ``../examples/custom_loss.py``, is right wherever the repository is read. On the site it
leads to a page made of that file.
"""

import ast
import posixpath
import re
from pathlib import Path
from typing import Any

import griffe
from mkdocs.structure.files import File, Files

ROOT = Path(__file__).resolve().parents[1]
RESULTS = "benchmarks/results"


def on_files(files: Files, config: Any) -> Files:
    """Add a page for every example, every result of a benchmark, and the repository's own pages."""
    for origin, place in _places().items():
        if origin == RESULTS:
            files.append(File.generated(config, place, content=_results()))
            continue
        text = (ROOT / origin).read_text(encoding="utf-8")
        content = _example(origin, text) if origin.endswith(".py") else text
        if origin == "LICENSE":
            content = f"# License\n\n{text}"
        files.append(File.generated(config, place, content=content))
    return files


def on_page_markdown(markdown: str, page: Any, config: Any, files: Files) -> str:
    """Turn links to files of the repository into links to their pages."""
    places = _places()
    origins = {place: origin for origin, place in places.items()}
    here = page.file.src_uri
    origin = origins.get(here, f"docs/{here}")

    def linked(found: re.Match[str]) -> str:
        target = posixpath.normpath(posixpath.join(posixpath.dirname(origin), found["path"]))
        place = places.get(target)
        if place is None:
            return found[0]
        return f"]({posixpath.relpath(place, posixpath.dirname(here) or '.')}{found['anchor'] or ''})"

    return re.sub(r"\]\((?P<path>[^):#\s]+)(?P<anchor>#[^)\s]*)?\)", linked, markdown)


def _places() -> dict[str, str]:
    """File of the repository → its place on the site."""
    examples = {f"examples/{path.name}": f"examples/{path.stem}.md" for path in (ROOT / "examples").glob("*.py")}
    results = {f"{RESULTS}/{path.name}": f"results/{path.name}" for path in (ROOT / RESULTS).glob("*.md")}
    results[RESULTS] = "results/index.md"
    pages = {"CHANGELOG.md": "changelog.md", "CONTRIBUTING.md": "contributing.md", "LICENSE": "license.md"}
    return dict(sorted({**examples, **results, **pages}.items()))


def _results() -> str:
    """A list of what was measured, newest first."""
    pages = sorted((ROOT / RESULTS).glob("*.md"), reverse=True)
    lines = [f"* {path.name[:10]}: [{_title(path)}]({path.name})" for path in pages]
    return "\n".join(
        ["# What was measured", "", "Each with its task, hardware, versions, commit and command.", "", *lines, ""]
    )


def _title(path: Path) -> str:
    return path.read_text(encoding="utf-8").partition("\n")[0].lstrip("# ")


def _example(origin: str, text: str) -> str:
    """An example's docstring as prose, and the code behind it."""
    said = ast.parse(text).body[0]
    title, _, rest = (ast.get_docstring(ast.parse(text)) or origin).partition("\n")
    code = "\n".join(text.splitlines()[said.end_lineno :]).strip()
    return f"# {title.partition(':')[0].rstrip('.')}\n\n{title}\n{rest}\n\n```python\n{code}\n```\n"


class SectionsOfTheHouse(griffe.Extension):
    """Reads this library's ``Example:`` as Google's ``Examples:``."""

    def on_instance(self, *, obj: griffe.Object, **kwargs: Any) -> None:
        """Called for every module, class and function, once its docstring is known."""
        if obj.docstring is not None:
            obj.docstring.value = re.sub(r"^Example:$", "Examples:", obj.docstring.value, flags=re.MULTILINE)
