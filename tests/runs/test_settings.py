"""Settings passed whole, or by keyword: the keywords are the fields."""

from dataclasses import fields
from pathlib import Path
from typing import get_type_hints

import pytest

import funcattrib as fa
from funcattrib.cli.less import Less
from funcattrib.cli.trackstar import Trackstar
from funcattrib.cli.trak import Trak
from funcattrib.data import Columns
from funcattrib.recipes import less, trackstar, trak
from funcattrib.runs.config import FittedConfig, GradientConfig, RowConfig
from funcattrib.runs.settings import (
    FittedSettings,
    GradientSettings,
    RowSettings,
    Source,
    SourceSettings,
    as_gradient_config,
    resolve,
)
from tests.support import cases


def names(config: type) -> set[str]:
    return {field.name for field in fields(config)}


@pytest.mark.parametrize(
    ("keywords", "config"),
    [(RowSettings, RowConfig), (FittedSettings, FittedConfig), (GradientSettings, GradientConfig)],
)
def test_keywords_are_the_fields(keywords: type, config: type) -> None:
    # By keyword, loss takes the function; identities are found once a run, and not given.
    source = names(Source) - {"loss_function", "identity", "reference_identity"}
    assert set(get_type_hints(SourceSettings)) == source
    assert set(get_type_hints(keywords)) == source | names(config)


def test_keywords_have_the_types_of_the_fields() -> None:
    wider = {"loss", "modules", "exclude", "split_attention_modules"}  # a function; one glob, or any sequence of them
    hints = {**get_type_hints(Source), **get_type_hints(GradientConfig)}
    found = {name: hint for name, hint in get_type_hints(GradientSettings).items() if name not in wider}
    assert found == {name: hints[name] for name in found}


@pytest.mark.parametrize(("command", "recipe"), [(Less, less), (Trackstar, trackstar), (Trak, trak)])
def test_a_command_has_the_defaults_of_its_recipe(command: type, recipe: object) -> None:
    default = next(field for field in fields(command) if field.name == "gradients").default_factory
    assert default() == recipe.DEFAULTS


def test_whole_objects_and_keywords_agree(tmp_path: Path) -> None:
    data = [{"input_ids": [1, 2, 3, 4]}, {"input_ids": [5, 6]}]
    model = cases.causal("llama")
    by_keyword = fa.collect_gradients(
        model, data, path=tmp_path / "a", projection_dim=2, modules="*.mlp.*", max_length=3, truncation=True, quiet=True
    )
    whole = fa.collect_gradients(
        model,
        data,
        path=tmp_path / "b",
        source=Source(max_length=3, truncation=True, quiet=True),
        gradients=GradientConfig(projection_dim=2, modules=("*.mlp.*",)),
    )
    assert (by_keyword.matrix()[:] == whole.matrix()[:]).all()
    assert by_keyword.manifest.loss == whole.manifest.loss


def test_keywords_change_what_is_passed_whole() -> None:
    source, rows = resolve(Source(split="a", quiet=True), RowConfig(seed=1, dtype="int8"), {"split": "b", "seed": 2})
    assert source == Source(split="b", quiet=True)
    assert rows == RowConfig(seed=2, dtype="int8")
    assert as_gradient_config(rows) == GradientConfig(seed=2, dtype="int8")


def test_queries_have_a_split_of_their_own() -> None:
    source = Source(columns=Columns("a"), split="train", subset="x", max_length=7)
    assert source.for_queries(None, "test") == Source(columns=Columns("a"), split="test", max_length=7)
    assert source.for_queries(Columns("b")) == Source(columns=Columns("b"), max_length=7)


def test_an_unknown_setting_is_named() -> None:
    with pytest.raises(fa.FuncattribError, match=r"unknown setting 'projection_dims'; did you mean 'projection_dim'\?"):
        resolve(None, RowConfig(), {"projection_dims": 4})
    with pytest.raises(fa.FuncattribError, match="unknown setting 'normalizer'"):
        resolve(None, RowConfig(), {"normalizer": "adam"})
