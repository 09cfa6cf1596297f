"""Preference pairs of an exam: `python -m rpo_jax.pair --config configs/<name>.py`.

Made of the judged answers that `rpo_jax.sample` stored, and of ground-truth explanations; see
`exams.preferences` for the strategies. `train` makes them too where they are missing.
"""

import dataclasses
import json
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from rpo_jax import cli
from rpo_jax.config import Config
from rpo_jax.data.files import (
    check_sums,
    digest_files,
    find_files,
    read_objects,
    sum_files,
    take_string,
)
from rpo_jax.data.ledger import Ledger
from rpo_jax.data.records import digest
from rpo_jax.errors import UserError
from rpo_jax.exams.asking import EXPLAIN_FIRST, digest_questions, find_prompt
from rpo_jax.exams.candidates import RIGHT, Candidate, judge, read_candidates, strip_cue
from rpo_jax.exams.exam import Exam
from rpo_jax.exams.igakuqa import Question
from rpo_jax.exams.preferences import (
    ALL_LEFT_OUT,
    Letters,
    Preference,
    balance_letters,
    explain_lack,
    letters_apart,
    prefer,
    sort_texts,
)
from rpo_jax.exams.responses import Response
from rpo_jax.exams.split import Split, find_leaks, hold_out, split_exam
from rpo_jax.sample import gather
from rpo_jax.writing import draft_folder, write_json

PAIRS_NOTE = "preferences.json"
# The line that `PromptFormat.target` writes itself.
_ANSWER_LINE = re.compile(r"(?:\A|\n)[ \t]*答え[ \t]*[:：][^\n]*\s*\Z")
_FORMAT = 2  # raised when other pairs are made of the same answers
LEDGERS = ("explanations", "answers", "questions", "pairs")


def main(config: Config) -> None:
    """Makes the preference pairs of a run, with an account of everything that became none."""
    print(describe(make_pairs(config)))


def make_pairs(config: Config) -> Path:
    """The folder of a run's pairs, `train.jsonl` and `heldout.jsonl`; made if it is not there yet.

    Raises:
        UserError: answers are missing, files are broken, or too much of the input is left out.
    """
    split = split_exam(config)
    candidates = gather(config, split)
    rules = config.data.pair
    files = digest_files(find_files(rules.explanations, (".jsonl",), "data.pair.explanations"))
    identity = {
        "format": _FORMAT,
        "candidates": candidates.name,
        "examined": digest_questions(split.examined, ()),
        "shots": config.data.sample.shots,
        "explanations": [file["sha256"] for file in files],
        "rules": {
            name: value
            for name, value in dataclasses.asdict(rules).items()
            if name not in ("explanations", "max_left_out_share")
        },
    }
    fingerprint = digest(identity)
    folder = Path(config.workdir) / "data" / f"preferences-{fingerprint[:16]}"
    if folder.is_dir():
        check_sums(folder, PAIRS_NOTE)
        return folder
    ledgers = {unit: Ledger(unit) for unit in LEDGERS}
    explanations = {question.id: question.explanation or "" for question in split.taught}
    paths = [Path(file["path"]) for file in files]
    explanations |= _read_explanations(paths, split, ledgers["explanations"])
    ledgers["explanations"].kept = sum(map(bool, explanations.values()))
    found = _pair(config, split, list(read_candidates(candidates)), explanations, ledgers)
    _check_shares(ledgers, rules.max_left_out_share)
    heldout = hold_out(split.taught, rules.heldout_share, rules.leak_share)
    sets = {
        "train": [record for record in found if record["question"] not in heldout],
        "heldout": [record for record in found if record["question"] in heldout],
    }
    if not all(sets.values()):
        raise UserError(
            f"{len(sets['train'])} pairs to train on, {len(sets['heldout'])} held out "
            f"(data.pair.heldout_share={rules.heldout_share:g}): neither may be empty; more "
            f"questions, or more answers to each, are wanted\n{_tell(ledgers)}"
        )
    with draft_folder(folder) as draft:
        for name, records in sets.items():
            _write_lines(draft / f"{name}.jsonl", records)
        info = {
            **identity,
            "fingerprint": fingerprint,
            "sha256": sum_files(draft, [f"{name}.jsonl" for name in sets]),
            "explanations": files,
            "summary": {name: _summarise(records) for name, records in sets.items()},
            "ledgers": {unit: ledger.to_dict() for unit, ledger in ledgers.items()},
        }
        write_json(draft / PAIRS_NOTE, info)
    return folder


def describe(folder: Path) -> str:
    """What is in a folder of pairs, and what is not and why."""
    info = json.loads((folder / PAIRS_NOTE).read_text(encoding="utf-8"))
    lines = [f"{folder}, {info['rules']['strategy']}:"]
    for name, found in info["summary"].items():
        kinds = ", ".join(f"{count:,} {kind}" for kind, count in found["relations"].items())
        lines.append(
            f"{name}: {found['pairs']:,} pairs of {found['questions']:,} questions; {kinds}"
        )
        lines += [
            f"  letters {how}: " + ", ".join(f"{x} {n:,}" for x, n in found[how].items())
            for how in ("preferred", "dispreferred")
        ]
    ledgers = {unit: Ledger.from_dict(info["ledgers"][unit]) for unit in LEDGERS}
    return "\n".join([*lines, _tell(ledgers)])


def _pair(
    config: Config,
    split: Split,
    candidates: Iterable[Candidate],
    explanations: Mapping[str, str],
    ledgers: dict[str, Ledger],
) -> list[dict[str, Any]]:
    """The records of all pairs, by question and mode."""
    rules, options = config.data.pair, config.data.sample
    by_question: dict[tuple[str, str], list[Candidate]] = {}
    for candidate in candidates:
        by_question.setdefault((candidate.question, candidate.mode), []).append(candidate)
    leaks = find_leaks(split.taught, split.examined, rules.leak_share)
    shown = split.demonstrations[: options.shots]
    letters = Letters.count(())
    found: list[tuple[str, Preference]] = []
    prompts: dict[str, tuple[Question, str, str]] = {}
    for question in split.taught:
        for mode in options.modes:
            name = f"{question.id}-{mode}"
            own = by_question.get((question.id, mode), [])
            if question.id in leaks:
                near, share = leaks[question.id]
                reason = f"an evaluation question, or {rules.leak_share:g} of one"
                ledgers["questions"].drop(reason, f"{question.id}: {share:.2f} of {near}")
                for one in own:
                    ledgers["answers"].drop(f"to {reason}", f"{question.id}, {one.key}")
                continue
            style = find_prompt(split.exam, mode, options.shots)
            explanation = explanations[question.id] if style.explains else None
            tiers = sort_texts(question, style, own, explanation, ledgers["answers"])
            preferences = prefer(name, tiers, rules, letters, ledgers["pairs"])
            if not preferences:
                reason = explain_lack(tiers, rules.strategy) if own else "no answer to it"
                ledgers["questions"].drop(reason, name)
                continue
            prompts[name] = (question, mode, style.render(question, shown))
            found += [(name, preference) for preference in preferences]
    found = balance_letters(found, rules.max_letter_ratio, ledgers["pairs"])
    ledgers["pairs"].kept = len(found)
    having = {name for name, _ in found}
    ledgers["questions"].kept = len(having)
    for name in sorted(prompts.keys() - having):
        ledgers["questions"].drop(ALL_LEFT_OUT, name)
    return [_record(*prompts[name], preference) for name, preference in found]


def _record(question: Question, mode: str, prompt: str, preference: Preference) -> dict[str, Any]:
    """A line of pairs; beside what `data.pairs` reads, where it comes from."""
    chosen, rejected = preference.chosen, preference.rejected
    return {
        "id": f"{question.id}-{mode}-{chosen.key}-{rejected.key}",
        "prompt": prompt,
        "chosen": chosen.text,
        "rejected": rejected.text,
        "question": question.id,
        "mode": mode,
        "relation": " over ".join(preference.relation),
        "chosen_answer": chosen.answer,
        "rejected_answer": rejected.answer,
    }


def _summarise(records: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    preferred: Counter[str] = Counter()
    dispreferred: Counter[str] = Counter()
    for record in records:
        chosen, rejected = record["chosen_answer"], record["rejected_answer"]
        preferred.update(letters_apart(chosen, rejected))
        dispreferred.update(letters_apart(rejected, chosen))
    return {
        "pairs": len(records),
        "questions": len({record["question"] for record in records}),
        "relations": Counter(record["relation"] for record in records),
        "modes": Counter(record["mode"] for record in records),
        "preferred": dict(sorted(preferred.items())),
        "dispreferred": dict(sorted(dispreferred.items())),
    }


def _read_explanations(paths: Iterable[Path], split: Split, ledger: Ledger) -> dict[str, str]:
    """Ground-truth explanations by question, as they stand between a prompt and its answer line.

    Raises:
        UserError: with file and line: a field is missing, or no text, or a question comes twice.
    """
    known = {question.id: question for question in split.taught}
    found: dict[str, str] = {}
    for path in paths:
        for where, record in read_objects(path):
            id_, text = (take_string(where, record, name) for name in ("id", "text"))
            said = strip_cue(text)
            answer = _ANSWER_LINE.search(said)
            body = said[: answer.start()] if answer else said
            if not body.strip():
                raise UserError(f"{where}: the explanation of {id_} is empty")
            if id_ in found:
                raise UserError(f"{where}: question {id_} was explained before")
            if id_ not in known:
                ledger.drop("of a question that is not trained on", f"{id_}, {where}")
            elif answer and not _is_right(split.exam, known[id_], said):
                ledger.drop("ends in another answer than the key's", f"{id_}, {where}")
            else:
                found[id_] = body
    return found


def _is_right(exam: Exam, question: Question, text: str) -> bool:
    response = Response(question.id, text)
    return judge(exam, question, EXPLAIN_FIRST, "", response).verdict == RIGHT


def _write_lines(path: Path, records: Iterable[Mapping[str, Any]]) -> None:
    with path.open("w", encoding="utf-8") as file:
        for record in records:
            file.write(json.dumps(record, ensure_ascii=False) + "\n")


def _check_shares(ledgers: Mapping[str, Ledger], allowed: float) -> None:
    for unit in ("answers", "questions"):
        if ledgers[unit].dropped_share > allowed:
            raise UserError(
                f"more than data.pair.max_left_out_share={allowed:g} of the {unit} is left out: "
                "wanted are more answers (data.sample.answers), more tokens where they are cut off "
                "(data.sample.answer_tokens, data.sample.explain_tokens), or a larger share\n"
                f"{_tell(ledgers)}"
            )


def _tell(ledgers: Mapping[str, Ledger]) -> str:
    return "\n".join(str(ledgers[unit]) for unit in LEDGERS)


if __name__ == "__main__":
    cli.run(
        main,
        examples=(
            "--config configs/fictional_pairs.py",
            "--config configs/fictional_pairs.py --config.data.pair.strategy=right_over_wrong",
        ),
    )
