"""What the runs of a study have learned before any medicine: its games, and what the base read of.

    python tests/benchmarks/games_learned.py --runs runs --study study-standard-world0 \\
        --out tests/benchmarks/games_learned.json

Each run continues fresh texts at temperature 0. Of the games: words said a second time, verdicts on
a password (right ones of those that apply and of those that do not), letters named by verdicts,
riddles and seals explained. Of the known diseases and the animals, with fresh questions: answers
alone, explanations, and these taken apart (`rpo_jax.exams.fictional.anatomy`).
"""

import argparse
import random
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

if __name__ == "__main__":  # run as a script, the folder of the repository is not on the path
    sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from rpo_jax.config import Mesh
from rpo_jax.exams.fictional import SIZES, make_world
from rpo_jax.exams.fictional.anatomy import take_apart
from rpo_jax.exams.fictional.domains import ANIMALS, MEDICINE, Domain
from rpo_jax.exams.fictional.games import (
    GAMES,
    Words,
    make_riddle,
    make_seals,
    make_words,
    tell_choice,
    tell_comparison,
    tell_twice,
)
from rpo_jax.exams.fictional.graph import Graph
from rpo_jax.exams.fictional.kinds import KINDS, explain, judge
from rpo_jax.exams.igakuqa import Question
from rpo_jax.exams.prompts import EXPLAIN_ZERO_SHOT_V1, NAME_ZERO_SHOT_V1
from rpo_jax.generation.batching import make_generate
from rpo_jax.generation.requests import Request, Settings
from rpo_jax.training.opening import Opened, open_model
from rpo_jax.writing import write_json
from tests.benchmarks.provenance import describe_run

TEXTS, TOKENS = 200, 132  # of each game; of a continuation at most
QUESTIONS = 12  # of each kind, about known diseases and about animals
Continue = Callable[[Sequence[str]], list[str]]


def make_continue(model: Opened) -> Continue:
    """Greedy continuations of prompts."""
    generate = make_generate(
        model.network, model.mesh, model.tokenizer, end_ids=model.end_ids, slots=64
    )

    def continue_(prompts: Sequence[str]) -> list[str]:
        settings = Settings(max_tokens=TOKENS)
        requests = [
            Request(str(i), model.tokenizer.encode(prompt), settings=settings)
            for i, prompt in enumerate(prompts)
        ]
        texts = {done.id: done.text for done in generate(model.params, requests)}
        return [texts[request.id] for request in requests]

    return continue_


def cut(text: str, *marks: str) -> tuple[str, str]:
    """A text before and after the last of some marks."""
    end = max(text.rfind(mark) + len(mark) for mark in marks if mark in text)
    return text[:end], text[end:]


def measure_games(continue_: Continue, words: Words) -> dict[str, float | None]:
    """Shares of right continuations."""
    rng = random.Random(1)
    copies = [cut(tell_twice(rng, words), "写しは", "彼も", "次の日も") for _ in range(TEXTS)]
    compared = [cut(tell_comparison(rng, words), "であり、") for _ in range(TEXTS)]
    chosen = [cut(tell_choice(rng, words), "のは") for _ in range(TEXTS)]
    found: dict[str, float | None] = {"copies": _share(continue_, copies)}
    for applies in (True, False):
        wanted = [pair for pair in compared if pair[1] == f"{judge(applies)}。"]
        found[f"comparisons, {'it is' if applies else 'it is not'}"] = _share(continue_, wanted)
    found["choices"] = _share(continue_, chosen)
    for name, make in (("riddles", make_riddle), ("seals", make_seals)):
        questions = [make(rng, words) for _ in range(TEXTS)]
        found |= {f"{name}, {k}": v for k, v in measure_answers(continue_, questions).items()}
    return found


def _share(continue_: Continue, pairs: Sequence[tuple[str, str]]) -> float:
    texts = continue_([prompt for prompt, _ in pairs])
    right = [text.startswith(wanted) for text, (_, wanted) in zip(texts, pairs, strict=True)]
    return sum(right) / len(right)


def measure_answers(continue_: Continue, questions: Sequence[Question]) -> dict[str, float | None]:
    """Shares of right answers after explaining, and explanations taken apart."""
    texts = continue_([EXPLAIN_ZERO_SHOT_V1.render(question) for question in questions])
    right = [
        text.partition("\n")[0].rpartition("。")[0].endswith(ending(question))
        for text, question in zip(texts, questions, strict=True)
    ]
    apart = take_apart(questions, texts)
    kept = ("needed", "verdict", "follows")
    return {"explained": sum(right) / len(right), **{name: apart[name] for name in kept}}


def ending(question: Question) -> str:
    """The last sentence of the true explanation, which names the letters."""
    assert question.explanation is not None
    return question.explanation.removesuffix("。").rpartition("。")[2]


def ask(rng: random.Random, graph: Graph, domain: Domain) -> list[Question]:
    """Questions about what the general text tells of; those that are computed are left out."""
    questions = []
    for kind in KINDS.values():
        for key in rng.sample(graph.subjects, QUESTIONS):
            asked = kind.ask(rng, graph, domain, key)
            truth = explain(graph, domain, asked) if asked and asked.choices else None
            if asked and truth:
                questions.append(
                    Question("", asked.text, asked.choices, truth.answers, explanation=truth.text)
                )
    return questions


def measure(folder: Path, words: Words, known: dict[str, list[Question]]) -> dict[str, Any]:
    """All of it for one run."""
    continue_ = make_continue(open_model(folder, Mesh(data=1, fsdp=1)))
    found: dict[str, Any] = dict(measure_games(continue_, words))
    if folder.name.endswith("-base"):
        for name, questions in known.items():
            for key, share in measure_answers(continue_, questions).items():
                found[f"{name}, {key}"] = share
            pairs = [
                (NAME_ZERO_SHOT_V1.render(q), NAME_ZERO_SHOT_V1.target(q, q.answers))
                for q in questions
            ]
            found[f"{name}, answered"] = _share(continue_, pairs)
    return {name: share if share is None else round(share, 3) for name, share in found.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--runs", type=Path, default=Path("runs"), help="folder of the runs")
    parser.add_argument(
        "--study", default="study-standard-world0", help="what their names begin with"
    )
    parser.add_argument("--world", type=int, default=0, help="its number")
    parser.add_argument("--out", type=Path, help="where the figures go, beside the terminal")
    args = parser.parse_args()
    world = make_world(args.world, SIZES["standard"])
    graphs = {"known diseases": (world.known, MEDICINE), "animals": (world.animals, ANIMALS)}
    names = (*world.medicine.names, *world.animals.names, *world.known.names)
    words = make_words(sorted({name[0] for name in names}))
    rng = random.Random(2)
    known = {name: ask(rng, graph, domain) for name, (graph, domain) in graphs.items()}
    figures: dict[str, Any] = {**describe_run("jax"), "runs": {}}
    for arm in (*GAMES, "base"):
        found = measure(args.runs / f"{args.study}-{arm}", words, known)
        figures["runs"][arm] = found
        print(arm, found, flush=True)
    if args.out:
        write_json(args.out, figures)


if __name__ == "__main__":
    main()
