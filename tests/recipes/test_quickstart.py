"""The quickstart on a few people: the whole way from invented facts to figures, through the command line."""

import json
import re

import pytest

from funcattrib.errors import FuncattribError
from funcattrib.recipes.invented_facts import invent_facts


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("quickstart") / "run"


@pytest.fixture(scope="module")
def said(folder):
    """What a reduced quickstart prints; the folder keeps what it wrote."""
    import contextlib
    import io

    from funcattrib.cli.main import main

    out = io.StringIO()
    with contextlib.redirect_stdout(out):
        assert main(["quickstart", str(folder), "--people", "12", "--epochs", "25"]) == 0
    return out.getvalue()


def figures(text: str) -> dict[str, list[float]]:
    lines = re.findall(r"^(random order|BM25|funcattrib) +([\d.]+) +([\d.]+)$", text, re.MULTILINE)
    return {name: [float(mrr), float(recall)] for name, mrr, recall in lines}


@pytest.mark.slow
def test_attribution_finds_the_facts(said):
    (random_mrr, random_recall), (lexical, _), (mrr, recall) = figures(said).values()
    assert random_mrr < 0.1
    assert random_recall < 0.1
    assert mrr > max(0.5, lexical)
    assert recall > 0.5


@pytest.mark.slow
def test_five_questions_are_shown_with_what_was_found(said):
    assert len(re.findall(r"^Fact \d+, asked as: ", said, re.MULTILINE)) == 5
    assert len(re.findall(r"^ +\d +-?[\d.]+ +\d+[a-e]  \w", said, re.MULTILINE)) == 20


@pytest.mark.slow
def test_the_folder_can_be_worked_with(said, folder, funcattrib):
    facts = [json.loads(line) for line in (folder / "facts.jsonl").read_text(encoding="utf-8").splitlines()]
    question = json.loads((folder / "questions.jsonl").read_text(encoding="utf-8").splitlines()[0])
    assert len(facts) == 12 * 6 * 4
    ask = ["--text", question["prompt"], "--completion", question["completion"], "--unit-norm"]
    ran = funcattrib("query", "--index", folder / "store", *ask)
    assert ran.code == 0, ran.err
    # The same question, the same answer as the quickstart's own first table.
    assert ran.out.splitlines()[1] == said.split("asked as: ")[1].splitlines()[2]
    assert funcattrib("inspect", folder / "store", "--verify").code == 0


def test_a_folder_that_holds_something_else_is_left_alone(tmp_path, funcattrib):
    (tmp_path / "thesis.tex").write_text("years of work")
    ran = funcattrib("quickstart", tmp_path)
    assert ran.code == 2
    assert f"{tmp_path} exists and holds no earlier quickstart; give another RUN" in ran.err
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.tex"]


@pytest.mark.parametrize("flag", ["--people", "--epochs"])
def test_nothing_to_do_is_refused(flag, tmp_path, funcattrib):
    ran = funcattrib("quickstart", tmp_path / "run", flag, 0)
    assert ran.code == 2
    assert f"expected {flag} of at least 1, found 0" in ran.err


# The corpus


def test_facts_depend_on_the_seed_alone():
    assert invent_facts(5, seed=3) == invent_facts(5, seed=3)
    assert invent_facts(5, seed=3) != invent_facts(5, seed=4)


def test_a_question_is_never_trained_on_and_its_fact_is():
    sentences, questions = invent_facts(20)
    trained = {row["prompt"] for row in sentences}
    for question in questions:
        same = [row for row in sentences if row["fact"] == question["fact"]]
        assert question["prompt"] not in trained
        assert len(same) == 4
        assert {row["completion"] for row in same} == {question["completion"]}
    assert len({row["id"] for row in (*sentences, *questions)}) == len(sentences) + len(questions)


def test_words_alone_do_not_say_which_fact_is_asked():
    """Some other fact about the same person has the same answer for most questions."""
    _, questions = invent_facts(40)
    who = [
        (re.search(r"[A-Z]\w+ [A-Z]\w+", row["prompt"].removeprefix("The "))[0], row["completion"]) for row in questions
    ]
    assert sum(who.count(one) > 1 for one in who) > len(who) / 2


@pytest.mark.parametrize("people", [0, 401])
def test_people_are_as_many_as_have_names(people):
    with pytest.raises(FuncattribError, match=f"expected 1 to 400 people, found {people}"):
        invent_facts(people)
