"""A small corpus of invented facts: who was born where, works for whom, and so on, each said in several ways.

Each fact is stated in all wordings of its relation but one, and asked in that one: the words of a question never stated
its fact, though they stated others. A person has few towns and companies, so name and answer together do not say which
fact is meant; only the sense of the wording does.
"""

import random
from typing import NamedTuple

from funcattrib.errors import FuncattribError

_FIRST = "Ada Bram Cleo Dario Edda Falk Greta Hugo Ines Jarl Kaya Lorn Mira Niels Oda Piet Runa Sven Tilda Yorick"
_LAST = (
    "Abernal Brimlow Castering Dovrak Elmquist Farrowby Gantry Holmsen Ivarson Jessop "
    "Kellmar Lundgate Mossley Norvang Oakhurst Pellam Quillon Rothwin Skarsby Tolland"
)
_TOWNS = "Alderwick Bellmoor Crowhaven Dunmere Eskford Fallowdale Greymouth Hollinsea Ironbridge Kestrelford"
_COMPANIES = "Argent Borealis Cobalt Drumlin Everglow Fathom Halcyon Lodestar Meridian Northlight"

# Possible answers, and the relations they answer, each in five wordings that end with the answer.
_RELATIONS = (
    (
        _TOWNS,
        (
            "{} was born in|{} comes from|{} hails from|{} is a native of|The birthplace of {} is",
            "{} lives in|{} resides in|{} has a house in|{} settled in|The home of {} is in",
            "{} got married in|{} tied the knot in|{} had the wedding in|{} wed in|The marriage of {} was in",
        ),
    ),
    (
        _COMPANIES,
        (
            "{} works for|{} is employed by|{} has a job at|{} draws a salary from|The employer of {} is",
            "{} was trained by|{} learned the trade at|{} was an apprentice at|{} got a diploma from|"
            "The apprenticeship of {} was at",
            "{} owns shares of|{} put money into|{} invests in|{} holds stock of|The savings of {} are in",
        ),
    ),
)


class InventedFacts(NamedTuple):
    """Training sentences and held-out questions, in random order.

    Rows with ``id``, ``fact`` (a number), ``prompt`` and ``completion``; an id is the fact's number and a letter for
    the wording. The sentences that bear on a question are those of the same fact.
    """

    sentences: list[dict[str, str | int]]
    questions: list[dict[str, str | int]]


def invent_facts(people: int = 40, seed: int = 0) -> InventedFacts:
    """Invent people, six facts about each, and for each fact four sentences and one question.

    Args:
        people: how many, 1 to 400.
        seed: the same seed gives the same corpus.

    Raises:
        FuncattribError: more people than there are names, or none.

    Example:
        >>> corpus = invent_facts(people=2)
        >>> len(corpus.sentences), len(corpus.questions)
        (48, 12)
    """
    names = [f"{first} {last}" for first in _FIRST.split() for last in _LAST.split()]
    if not 1 <= people <= len(names):
        raise FuncattribError(f"expected 1 to {len(names)} people, found {people}")
    choose = random.Random(seed)
    sentences: list[dict[str, str | int]] = []
    questions: list[dict[str, str | int]] = []
    fact = 0
    for name in choose.sample(names, people):
        for answers, relations in _RELATIONS:
            known = choose.sample(answers.split(), 2)
            for wordings in relations:
                fact, answer = fact + 1, choose.choice(known)
                rows: list[dict[str, str | int]] = [
                    {"id": f"{fact}{letter}", "fact": fact, "prompt": wording.format(name), "completion": f" {answer}."}
                    for letter, wording in zip("abcde", wordings.split("|"), strict=True)
                ]
                questions.append(rows.pop(choose.randrange(len(rows))))
                sentences += rows
    choose.shuffle(sentences)
    choose.shuffle(questions)
    return InventedFacts(sentences, questions)
