"""One setting, two names: an argument in Python, a flag on the command line."""

import logging

import pytest

import funcattrib as fa
from funcattrib.cli.build import Build
from funcattrib.cli.flags import setting_names, with_flags
from funcattrib.cli.output import reports_on_stderr
from funcattrib.cli.score import Score
from funcattrib.runs.config import GradientConfig

BUILD, SCORE = setting_names(Build), setting_names(Score)


@pytest.mark.parametrize(
    ("message", "settings", "shown"),
    [
        ("use a smaller `token_batch_size`", BUILD, "use a smaller --token-batch-size"),
        ("or `precision='fp32'`, `truncation`", BUILD, "or --precision fp32, --truncation"),
        ("`overwrite=True` starts over", BUILD, "--overwrite starts over"),
        ("give `query_stores` or `query_data`", SCORE, "give --query-path or --query-dataset"),
        ("give `query_stores` or `query_data`", BUILD, "give `query_stores` or `query_data`"),  # no setting of build
        ("name `columns=Columns(prompt_column=…)` or `seed`", BUILD, "name --prompt-column or --seed"),
        ("`columns=Columns(conversation_column='m')`", BUILD, "--conversation-column m"),
        ("`columns=Columns(skip_missing_rewards=True)`", BUILD, "--skip-missing-rewards"),
        ("`columns=Columns(prompt_column=…)`", [], "`columns=Columns(prompt_column=…)`"),
        ("run `funcattrib fit` or see `docs/store.md`", BUILD, "run `funcattrib fit` or see `docs/store.md`"),
    ],
)
def test_settings_are_named_by_their_flags(message: str, settings: list[str], shown: str) -> None:
    assert with_flags(message, settings) == shown


def test_python_names_the_argument() -> None:
    with pytest.raises(fa.FuncattribError, match="expected `projection_dim` of at least 0, found -1"):
        GradientConfig(projection_dim=-1)
    with pytest.raises(fa.FuncattribError, match="`num_heads` requires `split_attention_modules`"):
        GradientConfig(num_heads=2)


def test_the_command_line_names_the_flag(funcattrib, tmp_path) -> None:
    words = ("build", tmp_path / "run", "--model", tmp_path, "--dataset", "x", "--num-heads", 2)
    ran = funcattrib(*words)
    assert (ran.code, ran.err) == (2, "funcattrib build: --num-heads requires --split-attention-modules\n")


def test_what_a_command_raises_and_logs_names_flags(capsys) -> None:
    @reports_on_stderr
    def run(config: GradientConfig) -> int | None:
        logging.getLogger("funcattrib.test").warning("a smaller `sketch_dim` than %d", 7)
        raise fa.StoreError("give a `seed`")

    with pytest.raises(fa.StoreError, match="give a --seed"):
        run(GradientConfig())
    assert capsys.readouterr().err == "a smaller --sketch-dim than 7\n"
