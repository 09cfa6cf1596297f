"""A world: one closed fictional medicine with its texts, exam and preference pairs.

Everything follows from (seed, size, version): the same bytes on every Python.
"""

import random
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from functools import lru_cache

from rpo_jax.errors import UserError
from rpo_jax.exams import prompts
from rpo_jax.exams.fictional.domains import ANIMALS, MEDICINE, Domain
from rpo_jax.exams.fictional.games import GAMES, make_words, play
from rpo_jax.exams.fictional.graph import (
    SUBJECTS_STEP,
    Fact,
    Graph,
    coin_stems,
    make_graph,
)
from rpo_jax.exams.fictional.kinds import (
    CHOICES,
    KINDS,
    LETTERS,
    Ask,
    Kind,
    Reasoning,
    explain,
)
from rpo_jax.exams.fictional.passages import Document, tell_everyday, tell_facts
from rpo_jax.exams.igakuqa import FIRST_EXAM_YEAR, Question

VERSION = 6  # raise with any change of output; stored with every world
TEST_SEEDS_FROM = 1000
Taught = Sequence[tuple[Graph, Domain]]  # what the general text tells of

SPLIT_YEARS = {"train": 3001, "dev": 3002, "test": 3003}

# Of the cells (kind, disease) of a half, the parts that go to train, dev and test.
_SEEN_PARTS = {"train": 0.6, "dev": 0.1, "test": 0.3}
_UNSEEN_PARTS = {"dev": 0.2, "test": 0.8}
# Each with its sections: the diseases that training questions are about, and the others.
_HALVES = ((_SEEN_PARTS, "ABC"), (_UNSEEN_PARTS, "DEF"))
_ANSWER_ONLY_PAIRS = 0.25
_DEMONSTRATIONS = 3
_FEW_SHOT_DOCUMENTS = 0.05
_GAMES_EVERY = 8  # of the games of a sort, so many are one in the general text
# Of the general questions, those that come with the passage that answers them: reading is learned
# before recalling. Kinds of question that one passage about the subject answers.
_OPEN_BOOK_DOCUMENTS = 0.3
_OPEN_BOOK_KINDS = ("診断", "所見", "所見なし", "原因")
_FEW_SHOT = (prompts.OFFICIAL_V1, prompts.EXPLAIN_V1)
_ZERO_SHOT = (prompts.NAME_ZERO_SHOT_V1, prompts.EXPLAIN_ZERO_SHOT_V1)


@dataclass(frozen=True)
class Size:
    """How much of everything.

    Attributes:
        diseases: A multiple of 12; each has its own drug.
        animals: A multiple of 12; subjects of the general text.
        known: A multiple of 12; diseases of the general text, each with its own drug.
        paraphrases: Times the textbook tells every fact (twice for the chain to the drug).
        general_paraphrases: The same for the subjects of the general text.
        general_questions: Questions about them in the general text, each in both formats; the
            same one comes again with other choices.
        games: Texts of each sort in `GAMES`; the general text has some of all.
        everyday: Passages of filler prose.
        variants: Training questions for each (kind of question, disease) in the train split.
    """

    diseases: int
    animals: int
    known: int
    paraphrases: int
    general_paraphrases: int
    general_questions: int
    games: int
    everyday: int
    variants: int

    def __post_init__(self) -> None:
        for name in ("diseases", "animals", "known"):
            value = getattr(self, name)
            if value < SUBJECTS_STEP or value % SUBJECTS_STEP:
                raise UserError(
                    f"world size: {name} is {value}, allowed: multiples of {SUBJECTS_STEP}"
                )
        for field in fields(self):
            if getattr(self, field.name) < 1:
                value = getattr(self, field.name)
                raise UserError(f"world size: {field.name} is {value}, allowed: 1 or more")


SIZES: Mapping[str, Size] = {
    "tiny": Size(
        diseases=12,
        animals=12,
        known=12,
        paraphrases=2,
        general_paraphrases=1,
        general_questions=10,
        games=20,
        everyday=10,
        variants=1,
    ),
    "quick": Size(
        diseases=36,
        animals=24,
        known=24,
        paraphrases=12,
        general_paraphrases=4,
        general_questions=1500,
        games=3000,
        everyday=300,
        variants=2,
    ),
    "standard": Size(
        diseases=240,
        animals=60,
        known=180,
        paraphrases=48,
        general_paraphrases=12,
        general_questions=12000,
        games=24000,
        everyday=2000,
        variants=2,
    ),
}


@dataclass(frozen=True)
class Item:
    """An exam question with its origin.

    Attributes:
        question: Holds the ground-truth explanation.
        ask: What was asked of whom.
        recalls: The facts that its explanation uses; all are stated in the textbook.
    """

    question: Question
    ask: Ask
    recalls: tuple[Fact, ...]


@dataclass(frozen=True)
class Pair:
    """A preference: two responses to one prompt."""

    id: str
    prompt: str
    chosen: str
    rejected: str


@dataclass(frozen=True)
class World:
    """See `make_world`.

    Attributes:
        games: By sort, see `GAMES`: words copied, compared and chosen, where nothing need be known.
        general: For the base model: filler, animals, known diseases, both answer formats about
            either, and games.
        textbook: For continued pretraining: every medical fact in varied wordings.
        textbook_heldout: Every medical fact once, in wordings that `textbook` never uses.
        demonstrations: Three worked questions of the general text, for few-shot prompts.
        exam: Items by split. Sections A-C are about diseases that occur in training questions,
            D-F about the others, so that a score by section shows what training gave away.
        pairs: By split, ``train`` from the train questions and ``heldout`` from the dev ones.
    """

    seed: int
    size: Size
    medicine: Graph
    animals: Graph
    known: Graph
    games: Mapping[str, tuple[Document, ...]]
    general: tuple[Document, ...]
    textbook: tuple[Document, ...]
    textbook_heldout: tuple[Document, ...]
    demonstrations: tuple[Question, ...]
    exam: Mapping[str, tuple[Item, ...]]
    pairs: Mapping[str, tuple[Pair, ...]]


def is_test_world(seed: int) -> bool:
    """Whether a world is kept for reported results and must not be tuned on."""
    return seed >= TEST_SEEDS_FROM


@lru_cache(maxsize=2)
def make_world(seed: int, size: Size) -> World:
    """Makes the world with number `seed`.

    Raises:
        UserError: The seed is negative.
    """
    if seed < 0:
        raise UserError(f"world seed is {seed}, allowed: 0 and above")

    def stream(name: str) -> random.Random:
        # A stream a part, so that changing one part leaves the others as they are.
        return random.Random(f"rpo_jax fictional {VERSION} {seed} {name}")

    rng = stream("graphs")
    stems = coin_stems(rng)
    medicine = make_graph(rng, MEDICINE, size.diseases, stems)
    animals = make_graph(rng, ANIMALS, size.animals, stems)
    known = make_graph(rng, MEDICINE, size.known, stems)
    taught = ((animals, ANIMALS), (known, MEDICINE))
    items = _make_general_items(stream("general questions"), taught, size.general_questions)
    demonstrations = _choose_demonstrations(items)
    names = (*medicine.names, *animals.names, *known.names)
    words = make_words(sorted({name[0] for name in names}))
    rng = stream("games")
    games = {name: [play(rng, words, name) for _ in range(size.games)] for name in GAMES}
    general = _tell_general(stream("general"), size, taught, demonstrations, items)
    general += [text for texts in games.values() for text in texts[::_GAMES_EVERY]]
    stream("order").shuffle(general)
    rng = stream("textbook")
    textbook = [
        text
        for _ in range(size.paraphrases)
        for text in tell_facts(rng, medicine, MEDICINE, medicine.subjects, heldout=False)
    ]
    rng = stream("textbook heldout")
    heldout = tell_facts(rng, medicine, MEDICINE, medicine.subjects, heldout=True)
    exam = _make_exam(stream("exam"), medicine, size.variants)
    rng = stream("pairs")
    return World(
        seed=seed,
        size=size,
        medicine=medicine,
        animals=animals,
        known=known,
        games={name: _number(name, texts) for name, texts in games.items()},
        general=_number("general", general),
        textbook=_number("textbook", textbook),
        textbook_heldout=_number("heldout", list(heldout)),
        demonstrations=demonstrations,
        exam=exam,
        pairs={
            "train": tuple(_make_pairs(rng, medicine, "train", exam["train"])),
            "heldout": tuple(_make_pairs(rng, medicine, "heldout", exam["dev"])),
        },
    )


def _number(name: str, texts: Sequence[str]) -> tuple[Document, ...]:
    return tuple(Document(f"{name}-{i:06d}", text) for i, text in enumerate(texts))


def _make_exam(rng: random.Random, graph: Graph, variants: int) -> dict[str, tuple[Item, ...]]:
    found: dict[str, list[Item]] = {split: [] for split in SPLIT_YEARS}
    singles = dict.fromkeys(SPLIT_YEARS, 0)  # single-answer questions so far, by split
    asked: set[tuple[str, frozenset[str]]] = set()
    for half, (parts, rooms) in enumerate(_HALVES):
        for kind in KINDS.values():
            for split, keys in _split_cells(rng, graph, kind, half, parts):
                for key in keys * (variants if split == "train" else 1):
                    ask = kind.ask(rng, graph, MEDICINE, key)
                    if not ask or (ask.text, frozenset(ask.choices)) in asked:
                        continue
                    asked.add((ask.text, frozenset(ask.choices)))
                    answers = _explain_truly(graph, MEDICINE, ask).answers
                    if ask.choices and len(answers) == 1:
                        ask = _move_choice(ask, LETTERS.index(answers[0]), singles[split] % CHOICES)
                        singles[split] += 1
                    found[split].append(_make_item(graph, MEDICINE, ask, kind, rooms[kind.room]))
    return {s: _number_items(rng, items, SPLIT_YEARS[s]) for s, items in found.items()}


def _split_cells(
    rng: random.Random, graph: Graph, kind: Kind, half: int, parts: Mapping[str, float]
) -> Iterator[tuple[str, list[str]]]:
    """Yields the subjects that a split may ask about in this kind of question."""
    cells: dict[str, list[str]] = {}
    for key in [s for group in graph.halves[half] for s in group][:: kind.every]:
        cells.setdefault(_name_cell(graph, kind, key), []).append(key)
    names = rng.sample(sorted(cells), len(cells))
    for split, part in _divide(names, parts):
        yield split, [key for name in part for key in cells[name]]


def _name_cell(graph: Graph, kind: Kind, key: str) -> str:
    if kind.about is None:
        return key
    owner = graph.facts["remedy", key][0] if kind.about == "ban" else key
    return graph.facts[kind.about, owner][0]


def _move_choice(ask: Ask, source: int, target: int) -> Ask:
    """Exchanges two choices, so that right answers are dealt evenly over the letters."""
    order = list(range(len(ask.choices)))
    order[source], order[target] = order[target], order[source]
    return replace(
        ask,
        choices=tuple(ask.choices[i] for i in order),
        sources=tuple(ask.sources[i] for i in order),
    )


def _divide(keys: Sequence[str], parts: Mapping[str, float]) -> Iterator[tuple[str, Sequence[str]]]:
    """Cuts keys into consecutive parts; each split gets at least one while there are enough."""
    start, total = 0, 0.0
    for index, (split, part) in enumerate(parts.items()):
        total += part
        left_for_others = len(parts) - index - 1
        end = min(max(start + 1, round(total * len(keys))), len(keys) - left_for_others)
        yield split, list(keys[start:end])
        start = max(start, end)


def _make_item(graph: Graph, domain: Domain, ask: Ask, kind: Kind, section: str) -> Item:
    truth = _explain_truly(graph, domain, ask)
    banned: tuple[str, ...] = ()
    if kind.name == "治療":
        condition = ask.given[-1:]
        banned = tuple(c for c in ask.choices if graph.facts["ban", c] == condition)
    question = Question(
        id="",  # numbered when all are known
        text=ask.text,
        choices=ask.choices,
        answers=truth.answers,
        points=kind.points,
        section=section,
        category=kind.name,
        explanation=truth.text,
    )
    kinki = tuple(x for x, c in zip(question.letters, ask.choices, strict=True) if c in banned)
    return Item(replace(question, kinki=kinki), ask, truth.recalls)


def _explain_truly(graph: Graph, domain: Domain, ask: Ask) -> Reasoning:
    truth = explain(graph, domain, ask)
    assert truth is not None, ask  # the true facts always answer
    return truth


def _number_items(rng: random.Random, items: list[Item], year: int) -> tuple[Item, ...]:
    counts: dict[str, int] = {}
    numbered = []
    ordered = sorted(rng.sample(items, len(items)), key=lambda item: item.question.section)
    for item in ordered:
        section = item.question.section
        counts[section] = counts.get(section, 0) + 1
        id_ = f"{year - FIRST_EXAM_YEAR}{section}{counts[section]}"
        numbered.append(replace(item, question=replace(item.question, id=id_, year=year)))
    return tuple(numbered)


def _make_general_items(rng: random.Random, taught: Taught, count: int) -> list[Item]:
    """So many general questions, and a few more for demonstrations; choices drawn anew."""
    items: list[Item] = []
    while len(items) < count + _DEMONSTRATIONS:
        items += [
            _make_item(graph, domain, ask, kind, "A")
            for graph, domain in taught
            for kind in KINDS.values()
            for key in graph.subjects[:: kind.every]
            if (ask := kind.ask(rng, graph, domain, key))
        ]
    rng.shuffle(items)
    return [
        replace(item, question=replace(item.question, id=f"1A{i}"))
        for i, item in enumerate(items, start=1)
    ]


def _choose_demonstrations(items: Sequence[Item]) -> tuple[Question, ...]:
    """Three worked questions, of one, two and one letters."""
    found = [
        next(
            item.question
            for item in items
            if (len(item.question.answers), item.question.category) == (letters, category)
        )
        for letters, category in ((1, "検査"), (2, "所見"), (1, "診断"))
    ]
    # As in the published prompt.jsonl, demonstrations carry no metadata and no points.
    return tuple(replace(d, points=1, category="", kinki=()) for d in found)


def _tell_general(
    rng: random.Random,
    size: Size,
    taught: Taught,
    demonstrations: Sequence[Question],
    items: Sequence[Item],
) -> list[str]:
    texts = [tell_everyday(rng) for _ in range(size.everyday)]
    for _ in range(size.general_paraphrases):
        for graph, domain in taught:
            texts += tell_facts(rng, graph, domain, graph.subjects, heldout=False)
    shown_ids = {question.id for question in demonstrations}
    asked = [item for item in items if item.question.id not in shown_ids]
    for item in asked[: size.general_questions]:
        question, passage = item.question, ""
        formats = _ZERO_SHOT
        if item.ask.kind in _OPEN_BOOK_KINDS and rng.random() < _OPEN_BOOK_DOCUMENTS:
            graph, domain = next(t for t in taught if item.ask.key in t[0].alike)
            facts = tell_facts(rng, graph, domain, [item.ask.key], heldout=False)
            passage = next(facts) + "\n"
        elif rng.random() < _FEW_SHOT_DOCUMENTS:
            formats = _FEW_SHOT
        for format_ in formats:
            shown = demonstrations[: format_.shots]
            texts.append(passage + format_.render_worked(question, shown))
    return texts


def _make_pairs(
    rng: random.Random, graph: Graph, name: str, items: Sequence[Item]
) -> Iterator[Pair]:
    for item in items:
        question = item.question
        wrong = _misremember(rng, graph, item)
        if wrong is None:
            continue
        formats = {"explain": prompts.EXPLAIN_ZERO_SHOT_V1}
        if rng.random() < _ANSWER_ONLY_PAIRS:
            formats["answer"] = prompts.NAME_ZERO_SHOT_V1
        for label, format_ in formats.items():
            yield Pair(
                id=f"{name}-{question.id}-{label}",
                prompt=format_.render(question),
                chosen=format_.target(question, question.answers, question.explanation),
                rejected=format_.target(question, wrong.answers, wrong.text),
            )


def _misremember(rng: random.Random, graph: Graph, item: Item) -> Reasoning | None:
    """The reasoning of someone who exchanges one needed fact with that of another subject.

    Look-alikes are tried first. The wrong answer has as many letters as were asked for.
    """
    for relation, subject in rng.sample(item.recalls, len(item.recalls)):
        alike = [s for s in graph.alike[subject] if s != subject]
        named = [s for r, s in item.recalls if r == relation and s not in (subject, *alike)]
        for other in [*rng.sample(alike, len(alike)), *rng.sample(named, len(named))]:
            wrong = explain(graph.misremember(relation, subject, other), MEDICINE, item.ask)
            answers = item.question.answers
            if wrong and wrong.answers != answers and len(wrong.answers) == len(answers):
                return wrong
    return None
