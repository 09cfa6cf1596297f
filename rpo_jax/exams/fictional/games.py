"""Texts in which nothing need be known: they teach to copy, to compare and to choose.

A small model that reads facts alone learns to recall them long before it learns to say whether one
fits a question. What it lacks is practised here on words without a meaning.
"""

import random
from collections.abc import Callable, Mapping, Sequence

from rpo_jax.exams import prompts
from rpo_jax.exams.fictional.domains import ANIMALS
from rpo_jax.exams.fictional.kinds import CHOICES, ask_for, explain_choices, judge
from rpo_jax.exams.igakuqa import Question

Words = Callable[[random.Random, int], list[str]]

_SAID_TWICE = (
    "{s}。写しは{s}。",
    "彼女は{s}と言った。彼も{s}と言った。",
    "{s}を並べた。次の日も{s}を並べた。",
)
_SUFFIXES = tuple(suffix for found in ANIMALS.suffixes.values() for suffix in found)
_SAME_SUFFIX = 0.7  # of the groups of words, these end alike
_APPLIES = 0.4  # of the words of a comparison, these are the one compared with
_NEGATED = 0.3  # of the questions, these ask for what does not apply
_EXPLAINED = 0.5  # of the other riddles, these are told with an explanation
_NUMBERS = 0.2  # of the riddles, these are about numbers
_REPEATED = 0.3  # of the texts of a game, these are of the games before it
_SEALS = 0.5  # of the other riddles, these are about words that are drawn in the explanation


def make_words(stems: Sequence[str]) -> Words:
    """Words that are nobody's names: a character of some name, an ending of the animals'."""

    def draw(rng: random.Random, count: int) -> list[str]:
        ending = rng.choice(_SUFFIXES) if rng.random() < _SAME_SUFFIX else ""
        return [stem + (ending or rng.choice(_SUFFIXES)) for stem in rng.sample(stems, count)]

    return draw


def tell_twice(rng: random.Random, words: Words) -> str:
    """A few words, and the same words again."""
    said = "、".join(words(rng, rng.randrange(3, 9)))
    return rng.choice(_SAID_TWICE).format(s=said)


def tell_comparison(rng: random.Random, words: Words) -> str:
    """A password, and of each word that follows whether it is the one.

    With several passwords, or other words that come twice, it is not learned in minutes.
    """
    password, *others = words(rng, 10)
    said = [
        password if rng.random() < _APPLIES else others.pop() for _ in range(rng.randrange(4, 10))
    ]
    verdicts = "".join(f"{word}であり、{judge(word == password)}。" for word in said)
    return f"合い言葉は{password}である。{verdicts}"


def tell_choice(rng: random.Random, words: Words) -> str:
    """Verdicts on one word without a reason, and the letters of those that apply."""
    (word,) = words(rng, 1)
    judged = [(word, rng.random() < _APPLIES) for _ in range(CHOICES)]
    text, letters = explain_choices(judged, rng.random() < _NEGATED)
    return text if letters else tell_choice(rng, words)


def tell_riddle(rng: random.Random, words: Words) -> str:
    """A riddle with its answer, explained where the answer alone cannot be known or is said."""
    if rng.random() < _SEALS:
        return prompts.EXPLAIN_ZERO_SHOT_V1.render_worked(make_seals(rng, words))
    riddle = make_riddle(rng, words)
    answer = riddle.choices[riddle.letters.index(riddle.answers[0])]
    explained = answer in riddle.text or rng.random() < _EXPLAINED
    format_ = prompts.EXPLAIN_ZERO_SHOT_V1 if explained else prompts.NAME_ZERO_SHOT_V1
    return format_.render_worked(riddle)


# What is practised before there is anything to know, by the name of its texts.
GAMES: Mapping[str, Callable[[random.Random, Words], str]] = {
    "copies": tell_twice,
    "comparisons": tell_comparison,
    "choices": tell_choice,
    "riddles": tell_riddle,
}


def play(rng: random.Random, words: Words, name: str) -> str:
    """A text of a game, or now and then of one before it, which is easily forgotten."""
    names = list(GAMES)
    before = names[: names.index(name)]
    if before and rng.random() < _REPEATED:
        name = rng.choice(before)
    return GAMES[name](rng, words)


def make_riddle(rng: random.Random, words: Words) -> Question:
    """An exam question whose choices answer it: the same word, another word, the largest number."""
    if rng.random() < _NUMBERS:
        numbers = rng.sample(range(10, 100), CHOICES)
        return _ask(
            "最も大きい数はどれか。", [*map(str, numbers)], str(max(numbers)), negated=False
        )
    negated = rng.random() < _NEGATED
    applying = CHOICES - rng.randrange(1, 3) if negated else rng.randrange(1, 4)
    word, *others = words(rng, 1 + CHOICES)
    choices = [word] * applying + others[: CHOICES - applying]
    rng.shuffle(choices)
    return _ask(f"{word}と{'異なる' if negated else '同じ'}言葉はどれか。", choices, word, negated)


def make_seals(rng: random.Random, words: Words) -> Question:
    """An exam question about seals of words, which are told in its explanation alone.

    Nobody can know them: right or wrong are only the verdicts on what has just been told.
    """
    asked = rng.choice((1, 1, 3))
    seals = words(rng, asked * (1 + CHOICES))
    wanted, others = seals[:asked], seals[asked:]
    negated = rng.random() < _NEGATED
    applying = rng.sample(range(CHOICES), rng.randrange(1, 4))
    choices = words(rng, CHOICES)
    judged = []
    for place, word in enumerate(choices):
        applies = place in applying
        own = rng.sample(wanted, asked) if applies else others[place * asked :][:asked]
        judged.append((f"{word}の印は{'、'.join(own)}", applies))
    explanation, answers = explain_choices(judged, negated)
    what = "を印にもたない" if negated else "を印にもつ"
    text = f"{'、'.join(wanted)}{what}言葉はどれか。{ask_for(len(answers))}"
    return Question("", text, tuple(choices), answers, explanation=explanation)


def _ask(text: str, choices: Sequence[str], wanted: str, negated: bool) -> Question:
    verdicts = [(c, c == wanted) for c in choices]
    explanation, answers = explain_choices(verdicts, negated)
    text += ask_for(len(answers))
    return Question("", text, tuple(choices), answers, explanation=explanation)
