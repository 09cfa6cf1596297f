"""Preference pairs from judged answers and ground truth: which text is preferred to which.

A strategy is a list of relations between tiers. The tiers of a question in one mode are its
``truth`` (the ground-truth explanation with the key's answer), and the answers that are ``right``,
``wrong``, or ``unclear`` (none was found in them). Sources: right over wrong, arXiv:2404.19733;
the hierarchy, arXiv:2504.18080.
"""

import itertools
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from rpo_jax.config import Pair as Rules
from rpo_jax.data.ledger import Ledger
from rpo_jax.data.overlap import jaccard, take_ngrams
from rpo_jax.data.records import digest
from rpo_jax.exams.asking import ANSWER_ONLY
from rpo_jax.exams.candidates import RIGHT, UNCLEAR, WRONG, Candidate
from rpo_jax.exams.igakuqa import Question
from rpo_jax.exams.prompts import PromptFormat

TRUTH = "truth"
Relation = tuple[str, str]

STRATEGIES: Mapping[str, tuple[Relation, ...]] = {
    "right_over_wrong": ((RIGHT, WRONG),),
    "truth_over_wrong": ((TRUTH, WRONG),),
    "truth_over_any": ((TRUTH, WRONG), (TRUTH, RIGHT), (TRUTH, UNCLEAR)),
    "hierarchy": ((TRUTH, WRONG), (RIGHT, WRONG), (TRUTH, RIGHT)),
}
ALL_LEFT_OUT = "all its pairs are left out"
_TOLD = {TRUTH: "ground truth", RIGHT: "right answer", WRONG: "wrong answer"}
_GRAM = 3


@dataclass(frozen=True)
class Text:
    """A response that a pair may hold: where it is from, what it says, which answer it gives."""

    key: str
    text: str
    answer: tuple[str, ...]


@dataclass(frozen=True)
class Preference:
    """One text preferred to another."""

    chosen: Text
    rejected: Text
    relation: Relation

    @property
    def preferred_letters(self) -> set[str]:
        """Letters that the preferred answer has and the other lacks."""
        return letters_apart(self.chosen.answer, self.rejected.answer)

    @property
    def dispreferred_letters(self) -> set[str]:
        """Letters that the other answer has and the preferred one lacks."""
        return letters_apart(self.rejected.answer, self.chosen.answer)


def letters_apart(answer: Sequence[str], other: Sequence[str]) -> set[str]:
    """The letters that an answer has and the other lacks; of numbers, none."""
    return {letter for letter in set(answer) - set(other) if letter.isalpha()}


@dataclass
class Letters:
    """How often each answer letter was preferred and dispreferred so far."""

    preferred: Counter[str]
    dispreferred: Counter[str]

    @classmethod
    def count(cls, preferences: Iterable[Preference]) -> "Letters":
        """The letters of preferences."""
        found = cls(Counter(), Counter())
        for preference in preferences:
            found.add(preference)
        return found

    def add(self, preference: Preference, times: int = 1) -> None:
        """Counts a preference; -1 takes it back."""
        for letters, count in (
            (preference.preferred_letters, self.preferred),
            (preference.dispreferred_letters, self.dispreferred),
        ):
            for letter in letters:
                count[letter] += times

    def excess(self, preference: Preference) -> int:
        """How much a preference would add to what is out of balance; less is better."""

        def lean(letter: str) -> int:
            return self.dispreferred[letter] - self.preferred[letter]

        down = sum(map(lean, preference.dispreferred_letters))
        return down - sum(map(lean, preference.preferred_letters))


def sort_texts(
    question: Question,
    style: PromptFormat,
    candidates: Iterable[Candidate],
    explanation: str | None,
    ledger: Ledger,
) -> dict[str, list[Text]]:
    """The texts of a question in one mode, by tier.

    Answers alone are written as the prompt's format has them, right ones as the key has them: how a
    letter or a number is spelt is no preference. An answer that was cut off is of no use, for
    nobody knows how it ends; nor is a right one that goes on after its answer, which would teach
    just that. The same text counts once.

    Args:
        question: which.
        style: of the mode.
        candidates: its judged answers in this mode.
        explanation: the ground truth, for a mode that explains.
        ledger: of answers: learns which are of use.
    """
    tiers: dict[str, list[Text]] = {TRUTH: [], RIGHT: [], WRONG: [], UNCLEAR: []}
    gold = question.accepted[0]
    if explanation or not style.explains:
        tiers[TRUTH].append(Text(TRUTH, style.target(question, gold, explanation), gold))
    seen: set[str] = set()
    for one in candidates:
        example = f"{one.question}, {one.mode}, {one.key}"
        if one.stop_reason == "length":
            ledger.drop("cut off at the most tokens", example, one.tokens)
        elif one.mode == ANSWER_ONLY and not one.answer:
            ledger.drop("an answer alone that is none", f"{example}: {one.text[:40]!r}")
        elif not one.text.strip():
            ledger.drop("empty", example)
        elif style.explains and one.verdict == RIGHT and one.went_on:
            ledger.drop("right, but goes on after its answer", f"{example}: {one.text[-40:]!r}")
        else:
            answer = gold if one.verdict == RIGHT and not style.explains else one.answer
            text = one.text if style.explains else style.target(question, answer)
            if text in seen:
                ledger.drop("the same text as another answer to the question", example)
                continue
            seen.add(text)
            ledger.keep()
            tiers[one.verdict].append(Text(one.key, text, answer))
    return tiers


def prefer(
    question: str,
    tiers: Mapping[str, Sequence[Text]],
    rules: Rules,
    letters: Letters,
    pairs: Ledger,
) -> list[Preference]:
    """The preferences of a question in one mode.

    Relations take turns, and so do texts; among equals the one that brings the letters nearest to
    balance, then one by a hash: nothing depends on the order of the answers.

    Args:
        question: its id and mode, for the hash and the ledger.
        tiers: its texts.
        rules: strategy and limits.
        letters: of all preferences so far; those chosen here are added.
        pairs: the ledger of pairs.
    """
    options: dict[Preference, str] = {}
    texts: set[tuple[str, str]] = set()
    for relation in STRATEGIES[rules.strategy]:
        better, worse = (tiers[tier] for tier in relation)
        for chosen, rejected in itertools.product(better, worse):
            one, both = Preference(chosen, rejected, relation), (chosen.text, rejected.text)
            problem = "the texts of another pair" if both in texts else _find_problem(one, rules)
            texts.add(both)
            if problem:
                pairs.drop(problem, _name(question, one))
            else:
                options[one] = digest([question, *both])
    used: Counter[object] = Counter()
    found: list[Preference] = []

    def rank(one: Preference) -> tuple[int, int, int, str]:
        often = used[one.chosen.key] + used[one.rejected.key]
        return used[one.relation], often, letters.excess(one), options[one]

    while options and len(found) < rules.pairs_per_question:
        best = min(options, key=rank)
        del options[best]
        used.update((best.relation, best.chosen.key, best.rejected.key))
        letters.add(best)
        found.append(best)
    for one in options:
        pairs.drop("beyond data.pair.pairs_per_question", _name(question, one))
    return found


def explain_lack(tiers: Mapping[str, Sequence[Text]], strategy: str) -> str:
    """Why a question has no pair: the tiers that its strategy compares and that are empty."""
    wanted = dict.fromkeys(itertools.chain(*STRATEGIES[strategy]))
    lacking = [_TOLD[tier] for tier in wanted if tier in _TOLD and not tiers[tier]]
    return f"no {' and no '.join(lacking)}" if lacking else ALL_LEFT_OUT


def balance_letters(
    preferences: Sequence[tuple[str, Preference]], ratio: float, pairs: Ledger
) -> list[tuple[str, Preference]]:
    """Leaves out pairs until no letter is dispreferred too often.

    A model that sees one letter rejected far more often than chosen learns to avoid the letter.

    Args:
        preferences: with the name of each; the last ones go first.
        ratio: most times that a letter is dispreferred for each time that it is preferred, and one
            time more (few pairs say little); 0: any.
        pairs: the ledger of pairs.
    """
    kept = dict(enumerate(preferences))
    letters = Letters.count(preference for _, preference in preferences)
    by_letter: dict[str, list[int]] = {}
    for place, (_, preference) in kept.items():
        for letter in preference.dispreferred_letters:
            by_letter.setdefault(letter, []).append(place)

    def find_worst() -> str | None:
        over = {
            letter: count - ratio * (letters.preferred[letter] + 1)
            for letter, count in letters.dispreferred.items()
        }
        worst = max(over, key=lambda letter: (over[letter], letter), default=None)
        return worst if worst and over[worst] > 0 else None

    while ratio and (worst := find_worst()):
        place = by_letter[worst].pop()
        if place not in kept:
            continue
        name, preference = kept.pop(place)
        letters.add(preference, -1)
        pairs.drop("a letter would be dispreferred too often", f"{name}: {worst}")
    return list(kept.values())


def _find_problem(one: Preference, rules: Rules) -> str:
    """Why two texts make no pair; "" if they do."""
    shorter, longer = sorted((len(one.chosen.text), len(one.rejected.text)))
    if one.chosen.text == one.rejected.text:
        return "the same text twice"
    if longer > rules.max_length_ratio * shorter:
        return f"one text longer than {rules.max_length_ratio:g} times the other"
    if rules.max_similarity < 1 and _share(one) > rules.max_similarity:
        return f"more alike than {rules.max_similarity:g}"
    return ""


def _share(one: Preference) -> float:
    return jaccard(take_ngrams(one.chosen.text, _GRAM), take_ngrams(one.rejected.text, _GRAM))


def _name(question: str, one: Preference) -> str:
    return f"{question}, {one.chosen.key} over {one.rejected.key}"
