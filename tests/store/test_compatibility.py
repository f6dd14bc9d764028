"""What a store holds, as its manifest says it, and what takes a store of one kind alone."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

import funcattrib as fa
from funcattrib.errors import StoreError
from funcattrib.store import Manifest, create_store, merge_stores, open_store, read_manifest
from tests.support import store_run


def model() -> tuple[Callable, dict[str, torch.Tensor]]:
    return lambda params, example: (params["w"] @ example["x"]).sum() ** 2, {"w": torch.ones(2, 3)}


DATA = [{"x": [1.0, 2.0, 3.0]}, {"x": [0.5, 0.0, 1.0]}]


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A store of every kind, of one model and data set."""
    folder = tmp_path_factory.mktemp("kinds")
    settings = {"normalizer": "adafactor", "projection_dim": 0, "quiet": True}
    state = fa.fit_chain(model(), DATA, path=folder / "state", **settings).path
    gradients = fa.collect_gradients(model(), DATA, path=folder / "gradients", state=state, **settings).path
    scored = {"queries": gradients, "state": state, **settings}
    return {
        "state": state,
        "gradients": gradients,
        "scores": fa.score_gradients(model(), DATA, path=folder / "scores", **scored).path,
        "best scores": fa.score_gradients(model(), DATA, path=folder / "best", top_k=1, **scored).path,
    }


def forget_kind(run: Path) -> None:
    """Make a run's manifest one of an earlier release."""
    values = json.loads((run / "manifest.json").read_text())
    del values["kind"]
    (run / "manifest.json").write_text(json.dumps(values))


@pytest.mark.parametrize("run", ["state", "gradients", "scores", "best scores"])
def test_the_kind_is_kept(runs: dict[str, Path], tmp_path: Path, run: str) -> None:
    written = read_manifest(runs[run])
    assert written.kind == run.removeprefix("best ")
    assert json.loads((runs[run] / "manifest.json").read_text())["kind"] == written.kind
    (tmp_path / "manifest.json").write_bytes((runs[run] / "manifest.json").read_bytes())
    forget_kind(tmp_path)
    assert read_manifest(tmp_path) == written


def test_a_store_of_an_earlier_release_is_continued_and_merged(tmp_path: Path) -> None:
    whole = store_run.write(tmp_path / "whole")
    expected = store_run.contents(whole)
    parts = store_run.take_apart(whole, [tmp_path / "one", tmp_path / "two"])
    forget_kind(parts[0])
    merge_stores(tmp_path / "merged", parts)
    assert store_run.contents(tmp_path / "merged") == expected
    with create_store(parts[0], store_run.manifest()) as writer:
        assert writer.pending == [1, 3]
        store_run.fill(writer)
    assert store_run.contents(parts[0]) == expected


def test_a_kind_of_no_store(tmp_path: Path) -> None:
    text = store_run.manifest().to_json().replace('"gradients"', '"curvature"')
    with pytest.raises(StoreError, match="expected a store of kind gradients, scores, state, found 'curvature'"):
        Manifest.from_json(text)


@pytest.mark.parametrize(
    ("use", "wanted", "given"),
    [
        ("scores", "scores", "gradients"),
        ("scores", "scores", "state"),
        ("attributor", "gradients", "scores"),
        ("attributor", "gradients", "state"),
        ("queries", "gradients", "scores"),
        ("queries", "gradients", "state"),
        ("state", "a fitted state", "scores"),
        ("the query's state", "a fitted state", "scores"),
    ],
)
def test_another_kind_is_refused(runs: dict[str, Path], tmp_path: Path, use: str, wanted: str, given: str) -> None:
    uses: dict[str, Callable] = {
        "scores": fa.open_scores,
        "attributor": fa.Attributor,
        "queries": lambda path: fa.score_gradients(model(), DATA, path=tmp_path / "out", queries=path, quiet=True),
        "state": lambda path: fa.collect_gradients(model(), DATA, path=tmp_path / "out", state=path, quiet=True),
        "the query's state": lambda path: fa.Attributor(runs["gradients"], state=path),
    }
    found = {"state": "a fitted state"}.get(given, given)
    with pytest.raises(StoreError, match=f"expected {wanted} at .*, found another kind of store: {found}; "):
        uses[use](runs[given])
    assert not (tmp_path / "out").exists()


def test_a_state_in_the_place_of_rows(runs: dict[str, Path]) -> None:
    with pytest.raises(StoreError, match='holds another run: kind: expected "gradients", found "state"'):
        fa.collect_gradients(model(), DATA, path=runs["state"], normalizer="adafactor", projection_dim=0, quiet=True)
    assert open_store(runs["state"]).manifest.kind == "state"
