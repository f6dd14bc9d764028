"""What every test may use."""

import os
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

# Before transformers is imported: forked workers and tokenizer threads do not mix.
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import pytest
from hypothesis import settings

settings.register_profile("funcattrib", deadline=None, derandomize=bool(os.environ.get("CI")))
settings.load_profile("funcattrib")


class Ran(NamedTuple):
    code: int
    out: str
    err: str


@pytest.fixture
def funcattrib(capsys: pytest.CaptureFixture[str]) -> Callable[..., Ran]:
    """Run the command line in this process: `funcattrib("build", "runs/a", "--model", "m").code`."""

    def run(*argv: object, **options: object) -> Ran:
        from funcattrib.cli.main import main

        capsys.readouterr()
        try:
            code = main([str(word) for word in argv], **options)
        except SystemExit as stop:  # tyro's --help and its own errors
            code = stop.code
        return Ran(code, *capsys.readouterr())

    return run


@pytest.fixture(scope="session")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny GPT-NeoX and its tokenizer, as `save_pretrained` leaves them."""
    from tests.support.tiny import save_model

    return save_model(tmp_path_factory.mktemp("models") / "gpt_neox")
