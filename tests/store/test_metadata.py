"""The text of an example: which columns the manifest says hold it, and the rule for stores that do not say."""

from pathlib import Path

import pytest

import funcattrib as fa
from funcattrib.data.columns import shown_name
from funcattrib.store import Manifest
from funcattrib.store.metadata import example_text
from tests.support import store_run

TURNS = [{"role": "user", "content": "Where?"}, {"role": "assistant", "content": "Here."}]


@pytest.mark.parametrize(
    ("example", "columns", "text"),
    [
        ({"id": "1", "document": "a", "loss": 0.5}, ("document",), "a"),
        ({"completion": "b", "prompt": "a", "loss": 0.5}, ("prompt", "completion"), "a b"),
        ({"turns": TURNS}, ("turns",), "user: Where?\nassistant: Here."),
        ({"a": None, "b": "b"}, ("a", "b", "absent"), "b"),
        ({"id": "1", "text": "a"}, (), ""),
        ({"id": "1", "text": "a", "document": 3, "loss": 0.5}, None, "a"),
    ],
)
def test_text_of_an_example(example: dict, columns: tuple[str, ...] | None, text: str) -> None:
    assert example_text(example, columns) == text


def test_names_stay_apart() -> None:
    names = ["loss", "data.loss", "data.data.loss", "data.text", "text"]
    shown = [shown_name(name, ["id", "loss"]) for name in names]
    assert shown == ["data.loss", "data.data.loss", "data.data.data.loss", "data.text", "text"]


def test_the_manifest_keeps_the_columns(tmp_path: Path) -> None:
    run = store_run.write(tmp_path / "run", text_columns=("text",))
    assert fa.open_store(run).manifest.text_columns == ("text",)
    store_run.edit_manifest(run, "text_columns")
    store = fa.open_store(run, verify=True)
    assert store.manifest.text_columns is None
    assert example_text(store.examples[3], store.manifest.text_columns) == "document 3"
    assert Manifest.from_json(store.manifest.to_json()) == store.manifest
