"""What may be continued, compared or used together: kinds of stores, and the words for a difference."""

import json
import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

import funcattrib as fa
from funcattrib.errors import ChainError, FuncattribError, StoreError
from funcattrib.store import Manifest, create_store, lay_out, merge_stores, open_store, read_manifest
from funcattrib.store.compatibility import (
    check_gradients,
    check_leaves,
    check_queries,
    check_same_model,
    check_state,
    loss_differences,
)
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
    scored = {"query_stores": gradients, "state": state, **settings}
    return {
        "state": state,
        "gradients": gradients,
        "scores": fa.score_gradients(model(), DATA, path=folder / "scores", **scored).path,
        "best scores": fa.score_gradients(model(), DATA, path=folder / "best", top_k=1, **scored).path,
    }


def forget_kind(run: Path) -> None:
    """Make a run's manifest one of an earlier release."""
    store_run.edit_manifest(run, "kind")


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
        "queries": lambda path: fa.score_gradients(model(), DATA, path=tmp_path / "out", query_stores=path, quiet=True),
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


FINGERPRINTS = [letter * 64 for letter in "ab"]


def made(fingerprint: str = FINGERPRINTS[0], **changes: object) -> Manifest:
    return store_run.manifest(model={"id": "tiny", "fingerprint": fingerprint}, **changes)


ANOTHER: dict[str, tuple[str, Manifest, str]] = {
    "model": ("model", made(FINGERPRINTS[1]), "bbbbbbbbbbbb instead of aaaaaaaaaaaa"),
    "chain": ("chain", made(chain=[]), "no transforms instead of project(dim=8, shape=[3, 4]) → unit_norm()"),
    "leaf": (
        "leaves",
        made(leaves=lay_out({"0.weight": (8, 4)})),
        "1 of 32 columns instead of 3 of 64 columns, differing in 0.bias",
    ),
    "order": (
        "leaves",
        made(leaves=lay_out(dict(reversed(store_run.SHAPES.items())))),
        "3 of 64 columns instead of 3 of 64 columns, in another order",
    ),
}


@pytest.mark.parametrize("which", ANOTHER)
def test_queries_of_another_run_are_refused(which: str) -> None:
    what, query, difference = ANOTHER[which]
    check_queries(made(), made())
    said = f"the queries and the training gradients differ in their {what}: {difference}\n"
    with pytest.raises(FuncattribError, match=re.escape(said)):
        check_queries(made(), query)


def test_queries_of_another_state_are_refused() -> None:
    one, other = (made(computed_with={"state": hash_}) for hash_ in FINGERPRINTS)
    check_gradients(one, other)  # states aside
    with pytest.raises(FuncattribError, match=r"differ in their fitted state: bbbbbbbbbbbb instead of aaaaaaaaaaaa"):
        check_queries(one, other)
    with pytest.raises(FuncattribError, match=r"differ in their fitted state: none instead of aaaaaaaaaaaa"):
        check_queries(one, made())


@pytest.mark.parametrize("which", ANOTHER)
def test_a_state_of_another_run_is_refused(which: str, tmp_path: Path) -> None:
    what, wanted, difference = ANOTHER[which]
    with create_store(tmp_path, made(kind="state", rows=0)) as writer:
        writer.save_state({"moments": torch.arange(5.0)})
        writer.finish()
    given = open_store(tmp_path)
    check_state(made(), given)
    there, here = re.sub(", (differing in .*|in another order)$", "", difference).split(" instead of ")
    said = f"the state at {tmp_path} does not fit the {what} of this run: {here} instead of {there}"
    with pytest.raises(ChainError, match=re.escape(said)):
        check_state(wanted, given)


def test_losses_that_differ() -> None:
    query = made(loss={"kind": "ce", "reduction": "mean"})
    assert loss_differences(made(), made()) == []
    assert loss_differences(made(), query) == [("reduction", "sum", "mean")]


def test_another_model_is_named() -> None:
    known = {"id": "tiny", "architecture": "A", "dtype": "float32", "fingerprint": FINGERPRINTS[0]}
    store = store_run.manifest(model=known)
    check_same_model(store, {**known, "id": "elsewhere"})
    for changes, said in (
        ({"architecture": "B"}, "architecture A), found tiny with architecture B"),
        ({}, "fingerprint aaaaaaaaaaaa), found tiny with fingerprint bbbbbbbbbbbb"),
    ):
        with pytest.raises(FuncattribError, match=re.escape(said)):
            check_same_model(store, {**known, **changes, "fingerprint": FINGERPRINTS[1]})


def test_gradients_that_do_not_fit_a_store() -> None:
    leaves = {leaf.name: leaf for leaf in lay_out({"a": (2,), "b": (3,)})}
    check_leaves(leaves, {"b": (3,), "a": (2,)})
    for shapes, said in (
        ({"a": (2,)}, "store's 2 leaves in the query, found 1 (differing in 'b')"),
        ({"a": (2,), "b": (3,), "c": (1,)}, "found 3 (differing in 'c')"),
        ({"a": (2,), "b": (4,)}, "expected b of shape (3,), found (4,)"),
    ):
        with pytest.raises(FuncattribError, match=re.escape(said)):
            check_leaves(leaves, shapes)
