"""Five hundred inputs of the fuzzer; ``python -m tests.fuzz 20000 SEED`` tries others."""

import subprocess
import sys
from pathlib import Path
from random import Random

import pytest

from tests.fuzz.damage import Canary, damage_bytes, damage_json, plant

ROOT = Path(__file__).parents[2]


@pytest.mark.slow
def test_every_input_ends_in_a_result_or_in_one_line() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "tests.fuzz", "504"], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr[-2000:]
    assert done.stdout.splitlines()[-1] == "0 findings"


def test_damage_is_the_same_for_a_seed_and_is_damage() -> None:
    data, value = bytes(range(200)), {"a": [1, 2, {"b": "c"}], "d": None}
    assert damage_bytes(data, Random(3)) == damage_bytes(data, Random(3))
    assert sum(damage_bytes(data, Random(seed)) != data for seed in range(50)) > 45
    assert sum(damage_json(value, Random(seed)) != value for seed in range(50)) > 45


def test_a_canary_leaves_a_mark(tmp_path: Path) -> None:
    """A fuzzer that could not see code run would find nothing."""
    import pickle

    plant(tmp_path / "file", tmp_path / "mark")
    pickle.loads((tmp_path / "file").read_bytes())
    assert (tmp_path / "mark").exists()
    assert Canary(tmp_path / "other").__reduce__()[1] == (str(tmp_path / "other"),)


def test_what_goes_wrong_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A target that raises, one that dies, and one that does neither."""
    script = tmp_path / "script.py"
    script.write_text(
        "import os, sys\n"
        "from pathlib import Path\n"
        "import tests.fuzz.run as run\n"
        "from tests.fuzz.targets import Attempt\n"
        "run.TARGETS['odd'] = lambda base, here, draw: Attempt([(here.name,)])\n"
        "def command(words):\n"
        "    number = int(words[0])\n"
        "    if number == 1:\n"
        "        raise ValueError('raised')\n"
        "    if number == 2:\n"
        "        os.kill(os.getpid(), 11)\n"
        "    return 0, ''\n"
        "run.run_command = command\n"
        "for found in run.fuzz(Path('.'), 'odd', range(4)):\n"
        "    print(found.number, found.what.split('(')[0])\n"
    )
    done = subprocess.run(
        [sys.executable, script], cwd=ROOT, capture_output=True, text=True, check=True, env={"PYTHONPATH": str(ROOT)}
    )
    assert done.stdout.splitlines() == ["1 '1': ValueError: raised ", "2 the process died: status 11"]
