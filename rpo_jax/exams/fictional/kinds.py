"""The kinds of question: how each is asked, and how its answer follows from the facts.

`ask` draws a question about one key subject. `explain` goes through the choices one by one and
derives the answer from a graph: from the true one it gives the ground truth, from a graph with
two facts exchanged the reasoning, and the wrong answer, of someone who misremembers. Both speak
in the same sentences, so that only knowledge of the facts tells them apart.
"""

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from rpo_jax.exams.fictional.domains import Domain
from rpo_jax.exams.fictional.graph import Fact, Graph

CHOICES = 5
LETTERS = "abcde"
WEIGHTS_KG = (10, 20, 30, 40, 50)


@dataclass(frozen=True)
class Ask:
    """A question before its answer is known.

    Attributes:
        key: The subject it is about.
        sources: For each choice the subject or remedy that it was drawn from.
        given: What the text states (signs, a condition, a number), by kind.
        negated: Whether the choices that do not apply are asked for.
    """

    kind: str
    key: str
    text: str
    choices: tuple[str, ...]
    sources: tuple[str, ...]
    given: tuple[str, ...]
    negated: bool = False


@dataclass(frozen=True)
class Reasoning:
    """An explanation, the answer it ends in, and the facts it recalls, in order."""

    text: str
    answers: tuple[str, ...]
    recalls: tuple[Fact, ...]


class Recall:
    """Looks facts up in a graph and remembers which were used in the explanation."""

    def __init__(self, graph: Graph, domain: Domain):
        self.graph, self.domain = graph, domain
        self.used: list[Fact] = []

    def __call__(self, relation: str, subject: str) -> tuple[str, ...]:
        """The objects of a fact, noted as used."""
        if (relation, subject) not in self.used:
            self.used.append((relation, subject))
        return self.graph.facts[relation, subject]

    def clause(self, relation: str, subject: str) -> str:
        """The fact as a clause without its ending."""
        objects = self(relation, subject)
        return fill(self.domain.clauses[relation], subject, objects)


@dataclass(frozen=True)
class Verdicts:
    """A first thought, then for each choice what is recalled of it and whether it applies."""

    lead: str
    clauses: tuple[str, ...]
    applies: tuple[bool, ...]


@dataclass(frozen=True)
class Number:
    """A numeric derivation."""

    text: str
    value: int


@dataclass(frozen=True)
class Kind:
    """A kind of question.

    Attributes:
        wanted: What it asks for, in English.
        ask: Draws a question about a subject; None where the domain is too small for it.
        room: Index of the exam section; 1 holds the cases.
        points: What a right answer is worth.
        every: Asked of every n-th subject only.
        about: The relation whose object the text asks about, where that is not the subject:
            subjects that share it get nearly the same question, so they stay in one split.
    """

    name: str
    wanted: str
    ask: Callable[[random.Random, Graph, Domain, str], Ask | None]
    explain: Callable[[Recall, Ask], Verdicts | Number | None]
    room: int
    points: int = 1
    every: int = 1
    about: str | None = None


def fill(template: str, subject: str, objects: Sequence[str]) -> str:
    """Fills a template with a subject and the objects of one of its facts."""
    return template.format(s=subject, o="、".join(objects), t=objects[0], v=objects[-1])


def explain(graph: Graph, domain: Domain, ask: Ask) -> Reasoning | None:
    """Derives the answer of `ask` from `graph`; None if the facts give no answer at all."""
    recall = Recall(graph, domain)
    found = KINDS[ask.kind].explain(recall, ask)
    if found is None:
        return None
    if isinstance(found, Number):
        return Reasoning(found.text, (str(found.value),), tuple(recall.used))
    judged = list(zip(found.clauses, found.applies, strict=True))
    text, letters = explain_choices(judged, ask.negated)
    return Reasoning(found.lead + text, letters, tuple(recall.used)) if letters else None


def explain_choices(
    judged: Sequence[tuple[str, bool]], negated: bool
) -> tuple[str, tuple[str, ...]]:
    """Goes through the choices, each with what is said of it and whether it applies.

    Returns:
        The text, and the letters it ends in: of the choices that apply, or, `negated`, do not.
    """
    lettered = list(zip(LETTERS, judged, strict=False))
    letters = tuple(letter for letter, (_, applies) in lettered if applies != negated)
    lines = [f"{letter} {said}であり、{judge(applies)}。" for letter, (said, applies) in lettered]
    return "".join(lines) + f"{judge(not negated)}のは{'と'.join(letters)}である。", letters


def judge(applies: bool) -> str:
    """Whether something applies, in the words of explanations."""
    return "当てはまる" if applies else "当てはまらない"


def ask_for(letters: int) -> str:
    """What a question's text ends with if it wants several letters."""
    return f"{letters}つ選べ。" if letters > 1 else ""


def _half_of(graph: Graph, key: str) -> list[str]:
    half = next(h for h in graph.halves if graph.alike[key] in h)
    return [s for group in half for s in group]


def _others(rng: random.Random, graph: Graph, key: str) -> list[str]:
    """The other subjects of the key's half: look-alikes first, each part shuffled."""
    alike = [s for s in graph.alike[key] if s != key]
    far = [s for s in _half_of(graph, key) if s not in graph.alike[key]]
    return rng.sample(alike, len(alike)) + rng.sample(far, len(far))


def _make(
    rng: random.Random,
    kind: str,
    key: str,
    text: str,
    pairs: Sequence[tuple[str, str]],
    given: Sequence[str],
    wanted: int = 1,
    negated: bool = False,
) -> Ask:
    """Shuffles (choice, source) pairs into an Ask that wants `wanted` letters."""
    shuffled = rng.sample(list(pairs), len(pairs))
    text += ask_for(wanted)
    choices, sources = zip(*shuffled, strict=True)
    return Ask(kind, key, text, choices, sources, tuple(given), negated)


def _tell_case(rng: random.Random, graph: Graph, domain: Domain, key: str) -> tuple[str, list[str]]:
    shared = rng.sample(graph.facts["shared", key], len(graph.facts["shared", key]))
    own = graph.facts["own", key][0]
    text = rng.choice(domain.stems["case"]).format(shared="、".join(shared), own=own)
    return text, [*shared, own]


def _diagnose(recall: Recall, ask: Ask) -> str | None:
    """Whom the signs of the case fit, among the key and its look-alikes."""
    shared, own = set(ask.given[:3]), ask.given[3]
    for subject in recall.graph.alike[ask.key]:
        facts = recall.graph.facts
        if set(facts["shared", subject]) == shared and facts["own", subject] == (own,):
            for relation in ("shared", "own"):
                recall(relation, subject)
            return subject
    return None


def _ask_diagnosis(rng: random.Random, graph: Graph, domain: Domain, key: str) -> Ask | None:
    case, given = _tell_case(rng, graph, domain, key)
    picked = [key, *_others(rng, graph, key)[: CHOICES - 1]]
    text = case + rng.choice(domain.stems["subject"])
    return _make(rng, "診断", key, text, [(s, s) for s in picked], given)


def _explain_diagnosis(recall: Recall, ask: Ask) -> Verdicts | None:
    clauses, applies = [], []
    for subject in ask.sources:
        # A choice that already differs in the shared signs needs no second look.
        fits = set(recall("shared", subject)) == set(ask.given[:3])
        clauses.append(recall.clause("own" if fits else "shared", subject))
        applies.append(fits and recall("own", subject) == ask.given[3:4])
    return Verdicts("", tuple(clauses), tuple(applies))


def _ask_treatment(rng: random.Random, graph: Graph, domain: Domain, key: str) -> Ask | None:
    case, given = _tell_case(rng, graph, domain, key)
    picked = [key, *_others(rng, graph, key)[: CHOICES - 1]]
    remedies = [graph.facts["remedy", s][0] for s in picked]
    # The case has a condition that forbids one of the wrong remedies.
    condition = graph.facts["ban", rng.choice(remedies[1:3])][0]
    text = case + rng.choice(domain.stems["with_condition"]).format(o=condition)
    text += rng.choice(domain.stems["remedy"])
    pairs = list(zip(remedies, picked, strict=True))
    return _make(rng, "治療", key, text, pairs, [*given, condition])


def _explain_treatment(recall: Recall, ask: Ask) -> Verdicts | None:
    diagnosed = _diagnose(recall, ask)
    if diagnosed is None:
        return None
    remedy = recall("remedy", diagnosed)[0]
    facts, clauses = recall.graph.facts, []
    for choice in ask.choices:
        owner = next((s for s in ask.sources if facts["remedy", s] == (choice,)), None)
        if choice != remedy and facts["ban", choice] == ask.given[4:]:
            clauses.append(recall.clause("ban", choice))
        elif owner:
            clauses.append(recall.clause("remedy", owner))
        else:
            return None
    lead = _say_diagnosis(recall, diagnosed)
    return Verdicts(lead, tuple(clauses), tuple(c == remedy for c in ask.choices))


def _say_diagnosis(recall: Recall, subject: str) -> str:
    shared, own = recall.clause("shared", subject), recall("own", subject)[0]
    return f"{shared}、決め手は{own}であるから、{subject}と分かる。"


def _ask_ban(rng: random.Random, graph: Graph, domain: Domain, key: str) -> Ask | None:
    case, given = _tell_case(rng, graph, domain, key)
    pairs: dict[str, str] = {}
    for subject in [key, *_others(rng, graph, key)]:
        remedy = graph.facts["remedy", subject][0]
        pairs.setdefault(graph.facts["ban", remedy][0], subject)
    if len(pairs) < CHOICES:
        return None
    text = case + rng.choice(domain.stems["ban"])
    return _make(rng, "禁忌", key, text, list(pairs.items())[:CHOICES], given)


def _explain_ban(recall: Recall, ask: Ask) -> Verdicts | None:
    diagnosed = _diagnose(recall, ask)
    if diagnosed is None:
        return None
    remedy = recall("remedy", diagnosed)[0]
    banned = recall("ban", remedy)[0]
    facts, clauses = recall.graph.facts, []
    known = [remedy, *(facts["remedy", s][0] for s in ask.sources)]
    for choice in ask.choices:
        owner = next((r for r in known if facts["ban", r] == (choice,)), None)
        if owner is None:
            return None
        clauses.append(recall.clause("ban", owner))
    lead = _say_diagnosis(recall, diagnosed) + recall.clause("remedy", diagnosed) + "である。"
    return Verdicts(lead, tuple(clauses), tuple(c == banned for c in ask.choices))


def _ask_banned(rng: random.Random, graph: Graph, domain: Domain, key: str) -> Ask | None:
    """Which remedies a condition forbids, or (negated) which it does not."""
    remedy = graph.facts["remedy", key][0]
    condition = graph.facts["ban", remedy]
    remedies = [graph.facts["remedy", s][0] for s in _others(rng, graph, key)]
    same = [remedy] + [r for r in remedies if graph.facts["ban", r] == condition]
    different = [r for r in remedies if graph.facts["ban", r] != condition]
    applying = rng.randrange(1, min(4, len(same)) + 1)
    negated = applying > 2
    wanted = CHOICES - applying if negated else applying
    picked = same[:applying] + different[: CHOICES - applying]
    text = fill(rng.choice(domain.stems["not_banned" if negated else "banned"]), key, condition)
    return _make(rng, "禁忌薬", key, text, [(r, r) for r in picked], condition, wanted, negated)


def _explain_banned(recall: Recall, ask: Ask) -> Verdicts | None:
    clauses = tuple(recall.clause("ban", choice) for choice in ask.choices)
    return Verdicts("", clauses, tuple(recall("ban", c) == ask.given for c in ask.choices))


def _ask_signs(rng: random.Random, graph: Graph, domain: Domain, key: str) -> Ask | None:
    """Which signs a subject shows; a look-alike's own sign is always among the wrong ones."""
    return _ask_signs_of(rng, graph, domain, key, rng.randrange(2, 4), negated=False)


def _ask_absent_sign(rng: random.Random, graph: Graph, domain: Domain, key: str) -> Ask | None:
    return _ask_signs_of(rng, graph, domain, key, CHOICES - 1, negated=True)


def _ask_signs_of(
    rng: random.Random, graph: Graph, domain: Domain, key: str, applying: int, negated: bool
) -> Ask:
    shared, own = graph.facts["shared", key], graph.facts["own", key]
    true_signs = [*own, *rng.sample(shared, applying - 1)]
    pairs = dict.fromkeys(true_signs, key)
    for subject in _others(rng, graph, key):
        if len(pairs) == CHOICES:
            break
        pairs.setdefault(graph.facts["own", subject][0], subject)
    kind = "所見なし" if negated else "所見"
    text = fill(rng.choice(domain.stems["not_signs" if negated else "signs"]), key, own)
    wanted = CHOICES - applying if negated else applying
    return _make(rng, kind, key, text, list(pairs.items()), (), wanted, negated)


def _explain_signs(recall: Recall, ask: Ask) -> Verdicts | None:
    shared, own = recall("shared", ask.key), recall("own", ask.key)
    facts, clauses, applies = recall.graph.facts, [], []
    for sign in ask.choices:
        applies.append(sign in shared + own)
        known = [ask.key, *ask.sources]
        owner = next((s for s in known if facts["own", s] == (sign,)), None)
        if sign in shared:
            clauses.append(recall.clause("shared", ask.key))
        elif owner:
            clauses.append(recall.clause("own", owner))
        else:
            return None
    return Verdicts("", tuple(clauses), tuple(applies))


def _ask_cause(rng: random.Random, graph: Graph, domain: Domain, key: str) -> Ask | None:
    cause = graph.facts["cause", key]
    others = _others(rng, graph, key)
    same = [key] + [s for s in others if graph.facts["cause", s] == cause]
    different = [s for s in others if graph.facts["cause", s] != cause]
    wanted = rng.randrange(1, min(3, len(same)) + 1)
    picked = same[:wanted] + different[: CHOICES - wanted]
    text = fill(rng.choice(domain.stems["cause"]), key, cause)
    return _make(rng, "原因", key, text, [(s, s) for s in picked], cause, wanted)


def _explain_cause(recall: Recall, ask: Ask) -> Verdicts | None:
    clauses = tuple(recall.clause("cause", choice) for choice in ask.choices)
    return Verdicts("", clauses, tuple(recall("cause", c) == ask.given for c in ask.choices))


def _ask_highest(rng: random.Random, graph: Graph, domain: Domain, key: str) -> Ask | None:
    gauge = graph.facts["gauge", key][0]
    peers = [s for s in _others(rng, graph, key) if graph.facts["gauge", s][0] == gauge]
    picked = [key, *peers[: CHOICES - 1]]
    text = fill(rng.choice(domain.stems["highest"]), key, (gauge,))
    return _make(rng, "検査", key, text, [(s, s) for s in picked], (gauge,))


def _explain_highest(recall: Recall, ask: Ask) -> Verdicts | None:
    values = [int(recall("gauge", choice)[1]) for choice in ask.choices]
    clauses = tuple(recall.clause("gauge", choice) for choice in ask.choices)
    return Verdicts("", clauses, tuple(v == max(values) for v in values))


def _ask_dose(rng: random.Random, graph: Graph, domain: Domain, key: str) -> Ask | None:
    weight = (str(rng.choice(WEIGHTS_KG)),)
    text = fill(rng.choice(domain.stems["dose"]), key, weight)
    return Ask("用量", key, text, (), (), weight)


def _explain_dose(recall: Recall, ask: Ask) -> Number | None:
    remedy = recall("remedy", ask.key)[0]
    amount, weight = int(recall("amount", remedy)[0]), int(ask.given[0])
    first, second = recall.clause("remedy", ask.key), recall.clause("amount", remedy)
    text = f"{first}である。{second}である。{amount}×{weight}＝{amount * weight}となる。"
    return Number(text, amount * weight)


KINDS = {
    kind.name: kind
    for kind in (
        Kind("診断", "disease of the signs", _ask_diagnosis, _explain_diagnosis, room=1),
        Kind("治療", "treatment", _ask_treatment, _explain_treatment, room=1, points=3),
        Kind("禁忌", "what forbids its drug", _ask_ban, _explain_ban, room=1, points=3),
        Kind("所見", "sign", _ask_signs, _explain_signs, room=0),
        Kind("所見なし", "absent sign", _ask_absent_sign, _explain_signs, room=0),
        Kind("原因", "cause", _ask_cause, _explain_cause, room=0, about="cause"),
        Kind("禁忌薬", "forbidden drug", _ask_banned, _explain_banned, room=2, about="ban"),
        Kind("検査", "extreme value", _ask_highest, _explain_highest, room=2, about="gauge"),
        Kind("用量", "dose", _ask_dose, _explain_dose, room=2, every=3),
    )
}
