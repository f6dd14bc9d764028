"""The package as others get it: lazy public names, and a wheel in an empty environment outside the checkout."""

import ast
import importlib
import os
import re
import subprocess
import sys
import sysconfig
import tomllib
import venv
import zipfile
from pathlib import Path
from typing import NamedTuple

import pytest

import funcattrib
from tests.support.waiting import OUTER_LIMIT

ROOT = Path(__file__).resolve().parents[2]


def python(code: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=OUTER_LIMIT, check=False, cwd=ROOT
    )


# Public names


def test_importing_the_package_imports_nothing_heavy():
    ran = python("import sys, funcattrib; print({'torch', 'transformers', 'numpy', 'datasets'} & set(sys.modules))")
    assert (ran.stdout, ran.stderr) == ("set()\n", "")


@pytest.mark.parametrize("name", sorted(funcattrib.__all__))
def test_public_names_exist(name):
    assert getattr(funcattrib, name) is getattr(funcattrib, name)
    assert name in dir(funcattrib)


def test_type_checkers_see_the_same_names():
    tree = ast.parse((ROOT / "funcattrib" / "__init__.py").read_text())
    block = next(node for node in tree.body if isinstance(node, ast.If))
    seen = {
        alias.name: node.module.removeprefix("funcattrib.")
        for node in block.body
        if isinstance(node, ast.ImportFrom)
        for alias in node.names
        if alias.asname == alias.name
    }
    assert seen == funcattrib._EXPORTS


def test_an_unknown_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="module 'funcattrib' has no attribute 'composse'"):
        funcattrib.composse  # noqa: B018


def test_no_exported_name_is_a_room():
    rooms = {path.parent.name for path in (ROOT / "funcattrib").glob("*/__init__.py")}
    modules = {path.stem for path in (ROOT / "funcattrib").glob("*.py")}
    assert not (rooms | modules) & funcattrib._EXPORTS.keys()


def test_submodules_are_still_bound():
    assert funcattrib.errors is importlib.import_module("funcattrib.errors")
    assert importlib.import_module("funcattrib.chain.chain").__name__ == "funcattrib.chain.chain"


# Versions


def canonical(requirement: str) -> str:
    return re.sub(r"[-_.]+", "-", re.match(r"[\w.-]+", requirement)[0]).lower()


def test_constraints_pin_all_that_is_installed_here():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]
    lines = [line for line in (ROOT / "constraints.txt").read_text().splitlines() if not line.startswith("#")]
    pins = {canonical(line): line.split("==")[1] for line in lines}
    assert pins["torch"] == "2.13.0"
    installed = [*project["dependencies"], *extras["cpu"], *extras["dev"], *extras["docs"]]
    assert {canonical(line) for line in installed} <= set(pins)
    assert not any("==" in line for line in project["dependencies"]), "a library's own dependencies stay ranges"
    assert set(extras) == {"cpu", "gpu", "jax", "peft", "train", "docs", "dev"}


# The wheel


class Installed(NamedTuple):
    python: Path
    script: Path
    wheel: Path


@pytest.fixture(scope="module")
def installed(tmp_path_factory) -> Installed:
    """The wheel in a new environment, which sees this one's third-party packages but not the checkout."""
    folder = tmp_path_factory.mktemp("wheel")
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--quiet"]
    build = [*pip, "wheel", "--no-deps", "--no-build-isolation", "--no-index", "--wheel-dir", folder, ROOT]
    subprocess.run(build, check=True, timeout=OUTER_LIMIT, stdin=subprocess.DEVNULL)
    (wheel,) = folder.glob("funcattrib-*.whl")
    venv.create(folder / "env", with_pip=False)
    paths = sysconfig.get_paths("venv", {"base": str(folder / "env"), "platbase": str(folder / "env")})
    interpreter = Path(paths["scripts"], "python")
    install = [*pip, "--python", interpreter, "install", "--no-deps", "--no-index", wheel]
    subprocess.run(install, check=True, timeout=OUTER_LIMIT, stdin=subprocess.DEVNULL)
    # A path in a .pth file is searched, but the .pth files inside it are not read: an editable install stays out.
    here = {sysconfig.get_path("purelib"), sysconfig.get_path("platlib")}
    Path(paths["purelib"], "third_party.pth").write_text("\n".join(sorted(here)))
    return Installed(interpreter, Path(paths["scripts"], "funcattrib"), wheel)


def outside(command: list[object], folder: Path, timeout: float = OUTER_LIMIT) -> subprocess.CompletedProcess[str]:
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}
    words = [str(word) for word in command]
    return subprocess.run(
        words, cwd=folder, env=environment, capture_output=True, text=True, timeout=timeout, check=False
    )


def test_the_wheel_holds_the_package_and_nothing_else(installed):
    names = zipfile.ZipFile(installed.wheel).namelist()
    info = f"funcattrib-{funcattrib.__version__}.dist-info/"
    assert {name.split("/")[0] + "/" for name in names} == {"funcattrib/", info}
    assert {"funcattrib/py.typed", "funcattrib/cli/main.py", f"{info}licenses/LICENSE"} <= set(names)
    tracked = subprocess.run(["git", "ls-files", "funcattrib"], cwd=ROOT, capture_output=True, text=True, check=False)
    assert set(tracked.stdout.split()) <= set(names)
    metadata = zipfile.ZipFile(installed.wheel).read(f"{info}METADATA").decode()
    for line in ("Requires-Python: >=3.11", "Requires-Dist: torch>=2.10", "Requires-Dist: transformers>=5"):
        assert line in metadata


def test_the_wheel_is_what_is_imported(installed, tmp_path):
    code = "import funcattrib, sys; print(funcattrib.__file__); assert not [p for p in sys.path if p == sys.argv[1]]"
    ran = outside([installed.python, "-c", code, ROOT], tmp_path)
    assert ran.returncode == 0, ran.stderr
    assert Path(ran.stdout.strip()).is_relative_to(installed.python.parents[1])


def test_the_installed_command_answers(installed, tmp_path):
    ran = outside([installed.script, "--help"], tmp_path)
    assert (ran.returncode, ran.stderr) == (0, "")
    assert "quickstart" in ran.stdout
    ran = outside([installed.script, "quickstart", "--help"], tmp_path)
    assert (ran.returncode, ran.stderr) == (0, "")
    assert "usage: funcattrib quickstart" in ran.stdout


@pytest.mark.slow
def test_installed_quickstart_runs(installed, tmp_path):
    """Becomes a test (with the prefix test_) as soon as the command is there."""
    ran = outside([installed.script, "quickstart"], tmp_path, timeout=OUTER_LIMIT)
    assert ran.returncode == 0, ran.stderr
    assert "MRR" in ran.stdout
