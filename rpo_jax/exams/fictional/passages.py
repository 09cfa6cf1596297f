"""Prose: facts in many wordings, and filler about everyday things."""

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from rpo_jax.exams.fictional.domains import Domain, Templates
from rpo_jax.exams.fictional.graph import Graph
from rpo_jax.exams.fictional.kinds import fill

_SUBJECT_RELATIONS = ("shared", "own", "cause", "remedy", "gauge")
_REMEDY_RELATIONS = ("ban", "amount")

# Everyday words only: nothing here may teach a fact of either domain.
_TIMES = ("朝", "昼すぎ", "夕方", "日曜日", "春のはじめ", "夏の終わり", "雪の日", "休みの前の晩")
_PEOPLE = ("祖母", "郵便屋", "先生", "隣の人", "店の主人", "妹", "船長", "学生", "大工", "旅の楽師")
_PLACES = ("駅前", "川べり", "市場", "図書館", "港", "坂の上", "畑", "古い橋", "広場", "台所")
_THINGS = ("手紙", "傘", "古い地図", "かご", "時計", "自転車", "本", "椅子", "弁当", "毛布")
_ACTIONS = (
    "を見つけた",
    "を直していた",
    "を忘れてきた",
    "を友人に渡した",
    "を大切に運んだ",
    "をそっと置いた",
    "を探していた",
    "を買い求めた",
)
_THOUGHTS = (
    "静かな時間だった。",
    "それからゆっくり家に帰った。",
    "理由はだれも知らない。",
    "空はよく晴れていた。",
    "次の日も同じことをした。",
    "思ったより時間がかかった。",
    "二人は顔を見合わせて笑った。",
    "よい一日であった。",
)


@dataclass(frozen=True)
class Document:
    """One training text."""

    id: str
    text: str


def tell_facts(
    rng: random.Random, graph: Graph, domain: Domain, subjects: Sequence[str], heldout: bool
) -> Iterator[str]:
    """Yields two passages a subject that state all its facts, with one case.

    The wordings are drawn anew at each call; `heldout` ones are never used otherwise.
    """
    statements = domain.heldout_statements if heldout else domain.statements
    cases = domain.heldout_cases if heldout else domain.cases
    for subject in subjects:
        opening = rng.choice(domain.openings).format(s=subject)
        yield opening + _state(rng, graph, statements, subject, _SUBJECT_RELATIONS)
        remedy = graph.facts["remedy", subject][0]
        text = _state(rng, graph, statements, remedy, _REMEDY_RELATIONS)
        again = fill(rng.choice(statements["remedy"]), subject, (remedy,))
        shared = rng.sample(graph.facts["shared", subject], len(graph.facts["shared", subject]))
        case = rng.choice(cases).format(
            s=subject, shared="、".join(shared), own=graph.facts["own", subject][0], remedy=remedy
        )
        yield rng.choice(domain.openings).format(s=remedy) + again + text + case


def _state(
    rng: random.Random, graph: Graph, statements: Templates, name: str, relations: Sequence[str]
) -> str:
    sentences = []
    for relation in relations:
        objects = list(graph.facts[relation, name])
        if relation == "shared":
            rng.shuffle(objects)
        sentences.append(fill(rng.choice(statements[relation]), name, objects))
    rng.shuffle(sentences)
    return "".join(sentences)


def tell_everyday(rng: random.Random) -> str:
    """A short passage about nothing in particular."""
    sentences = []
    for _ in range(rng.randrange(2, 6)):
        who = f"{rng.choice(_TIMES)}、{rng.choice(_PEOPLE)}は{rng.choice(_PLACES)}で"
        sentences.append(f"{who}{rng.choice(_THINGS)}{rng.choice(_ACTIONS)}。")
        if rng.random() < 0.5:
            sentences.append(rng.choice(_THOUGHTS))
    return "".join(sentences)
