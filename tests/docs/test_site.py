"""The site: it builds strictly, needs no network to be read, and its reference has every public name."""

import importlib
import os
import pkgutil
import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path

import pytest

import funcattrib
from tests.support.pages import ROOT, text_of
from tests.support.waiting import OUTER_LIMIT

PACKAGES = ["funcattrib", *(f"funcattrib.{m.name}" for m in pkgutil.iter_modules(funcattrib.__path__) if m.ispkg)]
PUBLIC = [(package, name) for package in PACKAGES for name in getattr(importlib.import_module(package), "__all__", [])]
REFERENCE = sorted(f"docs/reference/{page.name}" for page in (ROOT / "docs/reference").glob("*.md"))


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("site")
    build = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(folder)]
    done = subprocess.run(
        build,
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=OUTER_LIMIT,
        env={**os.environ, "PYTHONPATH": str(ROOT), "NO_MKDOCS_2_WARNING": "1"},
    )
    assert done.returncode == 0, done.stderr
    return folder


class Loads(HTMLParser):
    """Collects what a browser fetches to show a page."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        given = dict(attrs)
        self.found += [given[name] for name in ("src", "srcset", "data", "poster") if given.get(name)]
        if tag == "link" and given.get("rel") not in ("canonical", "prev", "next"):
            self.found.append(given["href"])


@pytest.mark.slow
def test_reading_the_site_needs_no_network(site: Path) -> None:
    pages = list(site.rglob("*.html"))
    assert len(pages) > 20
    for page in pages:
        loads = Loads()
        loads.feed(page.read_text(encoding="utf-8"))
        assert loads.found
        assert not [each for each in loads.found if re.match(r"(https?:)?//", each)], page
        assert 'class="mermaid"' not in page.read_text(encoding="utf-8"), "its renderer is fetched from a server"
    for style in [*site.rglob("*.css"), *site.rglob("*.svg")]:
        assert not re.findall(r"(?:url\(|@import)\s*['\"]?(?:https?:)?//", style.read_text(encoding="utf-8")), style


@pytest.mark.slow
def test_every_page_is_reached_from_the_navigation(site: Path) -> None:
    start = (site / "index.html").read_text(encoding="utf-8")
    for page in (ROOT / "docs").rglob("*.md"):
        place = page.relative_to(ROOT / "docs").with_suffix("")
        where = str(place.parent if place.name == "index" else place)
        assert f'href="{where}/"' in start or where == ".", page


@pytest.mark.slow
def test_the_reference_shows_examples_as_code(site: Path) -> None:
    """``Example:`` is this library's word for what the renderer knows as ``Examples:``."""
    shown = (site / "reference/transforms/index.html").read_text(encoding="utf-8")
    assert "&gt;&gt;&gt;" in shown
    assert "<blockquote>" not in shown


def shown() -> set[str]:
    """What the reference's pages show, as dotted paths: a name by itself, or some members of a module."""
    entries = re.compile(r"^::: ([\w.]+)$(?:\n    options:\n      members: \[([\w, ]+)\])?", re.MULTILINE)
    found = [entry for page in REFERENCE for entry in entries.findall(text_of(page))]
    return {f"{path}.{member}" if member else path for path, members in found for member in members.split(", ")}


def resolve(path: str) -> object:
    module, _, name = path.rpartition(".")
    return getattr(importlib.import_module(module), name)


@pytest.mark.parametrize(("package", "name"), PUBLIC)
def test_the_reference_has(package: str, name: str) -> None:
    if name == "__version__":
        return
    value = getattr(importlib.import_module(package), name)
    assert any(path.rpartition(".")[2] == name and resolve(path) == value for path in shown()), f"{package}.{name}"


def test_examples_are_listed() -> None:
    page = text_of("docs/examples.md")
    for example in (ROOT / "examples").glob("*.py"):
        assert f"](../examples/{example.name})" in page, example.name


def test_every_transform_is_on_its_page() -> None:
    page = text_of("docs/transforms.md")
    costs = page[page.index("## What each costs") : page.index("## Which parameters")]
    for name in importlib.import_module("funcattrib.transforms").__all__:
        assert re.search(rf"`{name}\b", page), name
        assert name in ("AdamState", "AttentionConfig") or re.search(rf"`{name}\b", costs), f"{name}: its cost"
