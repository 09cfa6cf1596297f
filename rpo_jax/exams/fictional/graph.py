"""The facts of one closed domain: who looks like whom, what treats what, what must not be given.

The same shape serves the exam's diseases, and the animals and known diseases of the general text,
so that the forms of question and explanation can be learned on facts disjoint from the exam's. A
`subject` is a disease (an animal), a `remedy` its drug (its favourite food), and so on.
"""

import random
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace

from rpo_jax.exams.fictional.domains import Domain

GROUP = 3  # look-alikes: subjects that share all signs but one
SHARED_SIGNS = 3
SUBJECTS_STEP = 12  # two halves, each of pairs of groups that share one gauge

# Kanji of the second level of JIS X 0208, which no other text here has, by their rows in EUC-JP.
_RARE_ROWS = range(0xD0, 0xF4)

Fact = tuple[str, str]  # (relation, subject): the objects are looked up in a Graph


@dataclass(frozen=True)
class Graph:
    """All facts of a domain.

    Attributes:
        halves: Look-alike groups of subjects in two halves that share no subject and no remedy:
            training questions are about the first half only.
        facts: Objects by (relation, subject). Relations of a subject: ``shared`` (three signs),
            ``own`` (the one sign that its look-alikes lack), ``cause``, ``remedy``, ``gauge``
            (name and threshold). Relations of a remedy: ``ban`` (condition), ``amount``.
        alike: For each subject its group, for each remedy the remedies of that group.
    """

    halves: tuple[tuple[tuple[str, ...], ...], ...]
    facts: Mapping[Fact, tuple[str, ...]]
    alike: Mapping[str, tuple[str, ...]]

    @property
    def subjects(self) -> tuple[str, ...]:
        """All subjects, in a fixed order."""
        return tuple(s for half in self.halves for group in half for s in group)

    @property
    def names(self) -> tuple[str, ...]:
        """Every invented name, in a fixed order."""
        found = {subject for _, subject in self.facts}
        found |= {o for objects in self.facts.values() for o in objects if not o.isdecimal()}
        return tuple(sorted(found))

    def misremember(self, relation: str, one: str, other: str) -> "Graph":
        """The same graph with the objects of two subjects exchanged in one relation."""
        swapped = dict(self.facts)
        swapped[relation, one] = self.facts[relation, other]
        swapped[relation, other] = self.facts[relation, one]
        return replace(self, facts=swapped)


def coin_stems(rng: random.Random) -> Iterator[str]:
    """Yields rare kanji, never one twice, so that no name contains another.

    A name of one character is one or two tokens, also of a small vocabulary: what is learned about
    it is then learned by an embedding of its own, as it is of names that a large model knows.
    """
    cells = [bytes((row, cell)) for row in _RARE_ROWS for cell in range(0xA1, 0xFF)]
    stems = [cell.decode("euc_jp") for cell in cells]
    rng.shuffle(stems)
    yield from stems


def make_graph(rng: random.Random, domain: Domain, subjects: int, stems: Iterator[str]) -> Graph:
    """Draws a domain of `subjects` subjects (a multiple of 12) with names from `stems`."""

    def coin(kind: str, count: int) -> list[str]:
        return [next(stems) + rng.choice(domain.suffixes[kind]) for _ in range(count)]

    names = coin("subject", subjects)
    groups = [tuple(names[i : i + GROUP]) for i in range(0, subjects, GROUP)]
    remedies = dict(zip(names, coin("remedy", subjects), strict=True))
    shared_pool = coin("sign", max(8, len(groups)))
    own_pool = coin("sign", max(9, subjects // 2))
    facts: dict[Fact, tuple[str, ...]] = {}
    used: set[tuple[str, ...]] = set()
    for group in groups:
        while (shared := tuple(sorted(rng.sample(shared_pool, SHARED_SIGNS)))) in used:
            pass
        used.add(shared)
        for subject, own in zip(group, rng.sample(own_pool, GROUP), strict=True):
            facts["shared", subject] = shared
            facts["own", subject] = (own,)
            facts["remedy", subject] = (remedies[subject],)
            facts["amount", remedies[subject]] = (str(rng.randrange(2, 10)),)
    # Dealing in turn keeps objects equally common and look-alikes apart.
    for relation, kind, count in (
        ("cause", "cause", max(5, subjects // 8)),
        ("ban", "condition", max(5, subjects // 12)),
    ):
        pool = coin(kind, count)
        for index, name in enumerate(names):
            subject = remedies[name] if relation == "ban" else name
            facts[relation, subject] = (pool[index % count],)
    for start in range(0, subjects, 2 * GROUP):
        gauge = next(stems) + rng.choice(domain.suffixes["gauge"])
        sharing = names[start : start + 2 * GROUP]
        for name, value in zip(sharing, rng.sample(range(10, 100), 2 * GROUP), strict=True):
            facts["gauge", name] = (gauge, str(value))
    alike: dict[str, tuple[str, ...]] = {}
    for group in groups:
        alike |= dict.fromkeys(group, group)
        alike |= {remedies[s]: tuple(remedies[o] for o in group) for s in group}
    half = len(groups) // 2
    return Graph((tuple(groups[:half]), tuple(groups[half:])), facts, alike)
