"""The command line's frame, on a command of the tests' own; and its table, on the real ones."""

import inspect
import os
import re
import signal
import subprocess
import sys
import textwrap
from dataclasses import dataclass, field
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import Literal, get_type_hints

import pytest
import tyro
import yaml

from funcattrib.cli.config_file import settings
from funcattrib.cli.main import COMMANDS, Command, main
from funcattrib.errors import FuncattribError, StoreError
from tests.support.waiting import OUTER_LIMIT


@dataclass(frozen=True)
class Model:
    """The model.

    Args:
        model: Hub id or folder.
        dtype: Of its weights.
    """

    model: str
    dtype: Literal["float32", "float16"] = "float32"


@dataclass(frozen=True)
class Gradient:
    """What is computed of it."""

    modules: tuple[str, ...] = ()
    projection_dim: int = 16
    """Coordinates on each side."""
    damping: float | None = None


@dataclass(frozen=True)
class Toy:
    """Do nothing with many settings.

    Longer words about it.
    """

    run: tyro.conf.Positional[Path]
    """The folder."""
    source: Model
    gradient: Gradient = field(default_factory=Gradient)
    truncation: bool = False
    token_batch_size: int = 1024

    def __post_init__(self) -> None:
        if self.token_batch_size < 1:
            raise FuncattribError(f"expected --token-batch-size of 1 or more, found {self.token_batch_size}.")


seen: list[Toy] = []
TOY = {"toy": Command(__name__, "Do nothing with many settings.", resumable=True), "trip": Command("no.such", "…")}


def run(config: Toy) -> int | None:
    seen.append(config)
    ends = {
        "store": StoreError("expected a store, found a cat."),
        "bug": RuntimeError("a bug"),
        "stop": KeyboardInterrupt(),
    }
    if config.run.name in ends:
        raise ends[config.run.name]
    return 3 if config.run.name == "three" else None


@pytest.fixture
def toy(funcattrib):
    def toy(*words: object):
        seen.clear()
        return funcattrib("toy", *words, commands=TOY)

    return toy


def test_an_argument_that_is_no_text_is_refused(funcattrib) -> None:
    for word in ("\ud800", "a\x00b"):
        ran = funcattrib("inspect", word)
        assert ran.code == 2
        assert "is no text that a file name may have" in ran.err


def test_groups_are_flat_and_hyphens_and_underscores_alike(toy):
    assert toy("R", "--model", "m", "--token_batch_size", 7, "--projection-dim=4", "--modules", "a*", "b").code == 0
    assert seen[0] == Toy(Path("R"), Model("m"), Gradient(("a*", "b"), 4), token_batch_size=7)
    toy("--model=m", "--token-batch-size", 7, "--projection_dim", 4, "--modules", "a*", "b", "--truncation", "--", "R")
    assert seen[0] == Toy(Path("R"), Model("m"), Gradient(("a*", "b"), 4), truncation=True, token_batch_size=7)


def test_help_of_a_command(toy):
    ran = toy("--help")
    assert ran.code == 0
    assert "usage: funcattrib toy [-h] [OPTIONS] RUN" in ran.out
    for words in (
        "Do nothing with",
        "--config FILE",
        "--projection-dim INT",
        "Coordinates on each side",
        "Of its weights",
    ):
        assert words in ran.out
    assert "--damping FLOAT" in ran.out  # and no {None}|
    assert "(default: none)" in ran.out
    assert "\n\n\n" not in ran.out
    assert seen == []


def test_none_takes_a_setting_back(toy, tmp_path):
    file = tmp_path / "config.yaml"
    file.write_text("command: toy\ndamping: 0.5\nmodules: [a, b]\n")
    assert toy("R", "--model", "m", "--config", file).code == 0
    assert seen[0].gradient == Gradient(("a", "b"), damping=0.5)
    assert toy("R", "--model", "m", "--config", file, "--damping", "None", "--modules").code == 0
    assert seen[0].gradient == Gradient()


def test_exit_codes(toy):
    assert toy("R", "--model", "m").code == 0
    assert toy("three", "--model", "m").code == 3


def test_errors_for_the_reader_have_no_traceback(toy):
    ran = toy("store", "--model", "m")
    assert (ran.code, ran.out, ran.err) == (2, "", "funcattrib toy: expected a store, found a cat.\n")
    ran = toy("R", "--model", "m", "--token-batch-size", 0)
    assert (ran.code, ran.err) == (2, "funcattrib toy: expected --token-batch-size of 1 or more, found 0.\n")


def test_bugs_keep_their_traceback(toy):
    with pytest.raises(RuntimeError, match="a bug"):
        toy("bug", "--model", "m")


def test_ctrl_c(toy):
    ran = toy("stop", "--model", "m")
    assert ran.code == 130
    assert ran.err == "\nfuncattrib toy: interrupted. What is finished is kept: the same command continues it.\n"


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["R"], "--model"),
        (["R", "--model", "m", "--token-batch-sise", 3], "--token-batch-size"),
        (["R", "--model", "m", "--projection-dim", "many"], "many"),
        (["R", "--model", "m", "--dtype", "float12"], "float32"),
    ],
)
def test_wrong_flags(toy, words, says):
    ran = toy(*words)
    assert ran.code == 2
    assert says in ran.err
    assert "Traceback" not in ran.err


@pytest.mark.parametrize(
    ("word", "says"),
    [
        ("toi", "funcattrib: unknown command 'toi'; did you mean `toy`?\n"),
        ("zzz", "funcattrib: unknown command 'zzz'; choose from toy, trip.\n"),
    ],
)
def test_unknown_command(funcattrib, word, says):
    assert funcattrib(word, commands=TOY) == (2, "", says)


def test_no_command_prints_the_table(funcattrib):
    ran = funcattrib(commands=TOY)
    assert (ran.code, ran.out) == (2, "")
    assert "toy   Do nothing with many settings." in ran.err
    assert funcattrib("--help", commands=TOY).out == ran.err


# --config


@pytest.fixture
def config_file(tmp_path):
    def write(text: str) -> Path:
        path = tmp_path / "config.yaml"
        path.write_text(text)
        return path

    return write


def test_a_run_replays(toy, tmp_path):
    toy("R", "--model", "m", "--modules", "a", "b", "--damping", 1e-5, "--truncation", "--dtype", "float16")
    first = seen[0]
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump(settings(first, command="toy")))
    assert toy("--config", path).code == 0
    assert seen == [first]
    assert toy(f"--config={path}", "other", "--modules", "c", "--no-truncation", "--damping", "None").code == 0
    assert seen == [Toy(Path("other"), Model("m", "float16"), Gradient(("c",)))]


def test_a_file_may_hold_some_settings(toy, config_file):
    path = config_file("model: m\ntoken-batch-size: 5\ndamping: 1e-5\n")
    assert toy("R", "--config", path).code == 0
    assert seen == [Toy(Path("R"), Model("m"), Gradient(damping=1e-5), token_batch_size=5)]
    ran = toy("--config", path)
    assert ran.code == 2
    assert "RUN" in ran.err
    assert "default: 5" in toy("--help", "--config", path).out


def test_checks_of_the_configuration_hold_for_a_file_too(toy, config_file):
    ran = toy("R", "--config", config_file("model: m\ntoken_batch_size: 0\n"))
    assert (ran.code, ran.err) == (2, "funcattrib toy: expected --token-batch-size of 1 or more, found 0.\n")


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("modules_: [a]", "`toy` has no setting `modules_`; did you mean `modules`?"),
        ("qqq: 1\nzzz: 2", "`toy` has no setting `qqq`, `zzz`; its settings are damping, dtype, model"),
        ("command: build", "this file holds the settings of `build`, not of `toy`."),
        ("token_batch_size: many", "token_batch_size: expected int, found 'many'."),
        ("token_batch_size: yes", "token_batch_size: expected int, found True."),
        ("truncation: 1", "truncation: expected bool, found 1."),
        ("model: 3", "model: expected str, found 3."),
        ("model:", "model: expected str, found None."),
        ("modules: a", "modules: expected tuple[str, ...], found 'a'."),
        ("modules: [1]", "modules: expected str, found 1."),
        ("damping: high", "damping: expected float or null, found 'high'."),
        ("dtype: int8", "dtype: expected 'float32' or 'float16', found 'int8'."),
        ("run: 3", "run: expected Path, found 3."),
        ("- a\n- b", "expected lines of `setting: value`, found list."),
        ("a: [", "this file is not valid YAML"),
        ("model: m\ntoken_batch_size: 2001-13-45", "config.yaml, line 2: this value cannot be read: month must be in"),
        ("token_batch_size: 2001-12-24", "token_batch_size: expected int, found datetime.date(2001, 12, 24)."),
        ("model: !!int x", "line 1: this value cannot be read: invalid literal for int()"),
        ("a: &a [*a]", "line 1: this value cannot be read: found unconstructable recursive node"),
        ("model: m\nmodules: " + 9000 * "[", "line 2: more than 20 lists or mappings are inside one another."),
        ("model: !!python/object/apply:os.getcwd []", "line 1: this value cannot be read: could not determine a"),
    ],
)
def test_wrong_files(toy, config_file, text, says):
    ran = toy("R", "--config", config_file(text))
    assert ran.code == 2
    assert says in ran.err
    assert ran.err.count("\n") == 1
    assert seen == []


def test_no_file(toy, tmp_path):
    ran = toy("--config", tmp_path / "none.yaml")
    assert (ran.code, "none.yaml: this file cannot be read (No such file or directory)" in ran.err) == (2, True)
    assert "--config takes one file, found none" in toy("--config").err
    assert "--config takes one file, found two" in toy("--config", "a", "--config=b").err


def test_two_settings_of_one_name_are_a_mistake():
    @dataclass(frozen=True)
    class Twice:
        model: str
        source: Model

    with pytest.raises(ValueError, match="two settings of Twice are named 'model'"):
        settings(Twice("a", Model("b")), command="x")


# The program as a process


def python(code: str, **options: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", textwrap.dedent(code)]
    return subprocess.run(command, capture_output=True, text=True, timeout=OUTER_LIMIT, check=False, **options)


def test_overview_imports_little():
    ran = python(
        """
        import sys
        before = set(sys.modules)
        from funcattrib.cli.main import main
        assert main(["--help"]) == 0
        heavy = {"torch", "transformers", "datasets", "numpy", "rich", "tyro", "faiss"} & set(sys.modules)
        assert not heavy, heavy
        assert len(set(sys.modules) - before) < 80, sorted(set(sys.modules) - before)
        """
    )
    assert ran.returncode == 0, ran.stderr
    for name, command in COMMANDS.items():
        assert re.search(rf"^  {name} +{re.escape(command.summary)}$", ran.stdout, re.MULTILINE)


def test_a_closed_pipe_is_no_error():
    code = "import sys; from funcattrib.cli.main import main; sys.exit(main(['--help']))"
    ran = subprocess.run(
        f'{sys.executable} -c "{code}" | true', shell=True, capture_output=True, text=True, check=False
    )
    assert ran.stderr == ""


def test_ctrl_c_ends_a_real_process(tmp_path):
    (tmp_path / "slow.py").write_text(
        textwrap.dedent(
            """
            import dataclasses, time
            @dataclasses.dataclass(frozen=True)
            class Slow:
                "Wait."
            def run(config: Slow) -> None:
                print("ready", flush=True)
                time.sleep(100_000)  # until it is interrupted
            """
        )
    )
    code = (
        "from funcattrib.cli.main import Command, main; raise SystemExit(main(['slow'], {'slow': Command('slow', '')}))"
    )
    path = os.pathsep.join([str(tmp_path), *filter(None, sys.path)])
    process = subprocess.Popen(
        [sys.executable, "-c", code],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": path},
        preexec_fn=partial(signal.signal, signal.SIGINT, signal.SIG_DFL),  # a shell's background jobs ignore it
    )
    assert process.stdout.readline() == "ready\n"
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=OUTER_LIMIT)
    assert (process.returncode, err) == (130, "\nfuncattrib slow: interrupted.\n")


def test_version(funcattrib):
    import funcattrib as package

    assert funcattrib("--version").out == f"funcattrib {package.__version__}\n"


# The table


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_keeps_the_contract(name, funcattrib):
    command = COMMANDS[name]
    module = import_module(command.module)
    config_type = get_type_hints(module.run)["config"]
    assert config_type.__dataclass_params__.frozen
    assert inspect.getdoc(config_type).splitlines()[0] == command.summary
    assert len(command.summary) < 90
    ran = funcattrib(name, "--help")
    assert (ran.code, ran.err) == (0, "")


@pytest.mark.parametrize("name", COMMANDS)
def test_help_of_a_command_imports_no_torch(name):
    ran = python(
        f"""
        import sys
        from funcattrib.cli.main import main
        try:
            main(["{name}", "--help"])
        finally:
            heavy = {{"torch", "transformers", "datasets", "faiss"}} & set(sys.modules)
            assert not heavy, heavy
        """
    )
    assert (ran.returncode, ran.stderr) == (0, "")


def test_main_reads_the_arguments_of_the_process(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["funcattrib", "--version"])
    assert main() == 0
    assert capsys.readouterr().out.startswith("funcattrib ")
