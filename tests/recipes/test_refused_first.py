"""Mistakes in any input of a recipe are said before anything is computed or written."""

from functools import partial

import pytest
import torch

import funcattrib as fa
from funcattrib.errors import FuncattribError
from funcattrib.runs import workload
from tests.support import cases
from tests.support.saved_runs import records, save_run

GOOD, LONG = records((9, 5, 7), 1), [*records((6,), 2), {"input_ids": [5] * 65}, {"input_ids": [5] * 70}]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return save_run(tmp_path_factory.mktemp("run"))[0]


@pytest.fixture
def recipes(checkpoint, monkeypatch):
    def computed(*_, **__):
        raise AssertionError("rows were computed")

    monkeypatch.setattr(workload.Work, "bind", computed)
    common = {"projection_dim": 2, "quiet": True}
    return {
        "trackstar": partial(fa.trackstar, cases.causal("gpt_neox"), **common),
        "trak": partial(fa.trak, [cases.causal("gpt_neox")], sketch_dim=4, **common),
        "less": partial(fa.less, [checkpoint], **common),
        "score": lambda data, query, **more: fa.score_gradients(
            cases.causal("gpt_neox"), data, query_data=query, normalizer="adafactor", **common, **more
        ),
    }


NAMES = ["trackstar", "trak", "less", "score"]
FAULTS = {
    "long documents": (LONG, GOOD, r"at most 64 tokens, found 65 in row 1 of the data, and 1 more"),
    "long queries": (GOOD, LONG, r"at most 64 tokens, found 65 in row 1 of the data, and 1 more"),
    "columns of the queries": (GOOD, [{"question": "w1 w2"}], r"no column '(input_ids|text)'"),
    "no queries": (GOOD, [], "no rows"),
}


@pytest.mark.parametrize("fault", list(FAULTS))
@pytest.mark.parametrize("name", NAMES)
def test_faults_of_either_side_are_found_first(tmp_path, recipes, name, fault):
    data, query, says = FAULTS[fault]
    with pytest.raises(FuncattribError, match=says):
        recipes[name](data, query, path=tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("name", NAMES)
def test_a_folder_of_something_else_is_left_alone(tmp_path, recipes, name):
    (tmp_path / "config.json").write_text("{}")
    for overwrite in (False, True):
        with pytest.raises(FuncattribError, match=r"is no store: it has config\.json"):
            recipes[name](GOOD, GOOD, path=tmp_path, overwrite=overwrite)
    assert [entry.name for entry in tmp_path.iterdir()] == ["config.json"]


def test_a_store_of_another_kind_is_left_alone(tmp_path, checkpoint):
    fa.collect_gradients(cases.causal("gpt_neox"), GOOD, path=tmp_path / "run", projection_dim=2, quiet=True)
    before = sorted((tmp_path / "run").rglob("*"))
    with pytest.raises(FuncattribError, match="holds another run: of gradients, not of scores"):
        fa.trackstar(cases.causal("gpt_neox"), GOOD, GOOD, path=tmp_path / "run", quiet=True)
    assert sorted((tmp_path / "run").rglob("*")) == before


@pytest.mark.parametrize("projection", [0, 2])
@pytest.mark.parametrize("value", ["vector", "one", "whole", "number"])
def test_a_loss_that_is_no_number_is_refused(tmp_path, projection, value):
    made = {
        "vector": lambda v: v,
        "one": lambda v: v[:1],
        "whole": lambda v: v.sum().long(),
        "number": lambda v: 1.0,
    }[value]

    def loss(params, example):
        return made(example["x"] @ params["w"].T)

    params, data = {"w": torch.ones(4, 3)}, [{"x": [1.0, 2.0, 3.0]}] * 2
    with pytest.raises(FuncattribError, match="expected a loss that returns a scalar tensor"):
        fa.collect_gradients((loss, params), data, path=tmp_path / "run", projection_dim=projection, quiet=True)
    with pytest.raises(FuncattribError, match="expected a loss that returns a scalar tensor"):
        fa.per_example_grad(loss, params, {"x": torch.ones(2, 3)})
