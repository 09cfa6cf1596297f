"""The fictional world: deterministic, consistent, disjoint where it must be, safe on disk."""

import collections
import dataclasses
import hashlib
import json
import random
import re

import pytest

from rpo_jax.errors import UserError
from rpo_jax.exams.extraction import extract
from rpo_jax.exams.fictional import (
    SIZES,
    SPLIT_YEARS,
    Size,
    World,
    is_test_world,
    make_world,
    write_world,
)
from rpo_jax.exams.fictional.anatomy import follows, read_lines
from rpo_jax.exams.fictional.domains import ANIMALS, MEDICINE
from rpo_jax.exams.fictional.games import (
    make_riddle,
    make_seals,
    make_words,
    tell_choice,
    tell_comparison,
)
from rpo_jax.exams.fictional.graph import coin_stems
from rpo_jax.exams.fictional.kinds import KINDS, explain, fill, judge
from rpo_jax.exams.igakuqa import Question, read_demonstrations, read_questions
from rpo_jax.exams.prompts import EXPLAIN_V1, EXPLAIN_ZERO_SHOT_V1, OFFICIAL_V1

TINY_DIGEST = "531211ccaa975710ac3702dbfff88209c8e32a26f553e2bfb3e689880571dc02"


@pytest.fixture(scope="module", params=["tiny", "quick"])
def world(request) -> World:
    return make_world(3, SIZES[request.param])


@pytest.fixture(scope="module")
def quick() -> World:
    return make_world(3, SIZES["quick"])


def digest(directory) -> str:
    sums = [
        f"{path.relative_to(directory)} {hashlib.sha256(path.read_bytes()).hexdigest()}"
        for path in sorted(directory.rglob("*"))
        if path.is_file()
    ]
    return hashlib.sha256("\n".join(sums).encode()).hexdigest()


def names_of(graph) -> set[str]:
    """Every invented name of a domain (numbers left out)."""
    return set(graph.names)


def solve(graph, question: Question) -> tuple[str, ...]:
    """Answers a question from its published text and the facts, independently of the generator."""
    facts, text = graph.facts, question.text
    named = {name for name in names_of(graph) if name in text}

    def signs(subject):
        return {*facts["shared", subject], *facts["own", subject]}

    def choose(applies):
        return tuple(
            x for x, c in zip(question.letters, question.choices, strict=True) if applies(c)
        )

    if question.category in ("診断", "治療", "禁忌"):
        (patient,) = [s for s in graph.subjects if signs(s) <= named]
        remedy = facts["remedy", patient][0]
        wanted = {"診断": patient, "治療": remedy, "禁忌": facts["ban", remedy][0]}
        return choose(lambda c: c == wanted[question.category])
    if question.category == "検査":
        values = {c: int(facts["gauge", c][1]) for c in question.choices}
        assert len({facts["gauge", c][0] for c in question.choices}) == 1
        return choose(lambda c: values[c] == max(values.values()))
    if question.category == "原因":
        return choose(lambda c: facts["cause", c][0] in named)
    if question.category == "禁忌薬":
        negated = "禁忌でない" in text or "投与できる薬" in text
        return choose(lambda c: (facts["ban", c][0] in named) != negated)
    (subject,) = named & set(graph.subjects)
    if question.category == "用量":
        weight = int(re.search(r"体重(\d+)kg", text).group(1))
        return (str(weight * int(facts["amount", facts["remedy", subject][0]][0])),)
    return choose(lambda c: (c in signs(subject)) == (question.category == "所見"))


def played(world):
    return [document for texts in world.games.values() for document in texts]


def exam_items(world):
    return [item for items in world.exam.values() for item in items]


def test_bytes_of_the_tiny_world_are_pinned(tmp_path):
    assert digest(write_world(tmp_path / "w", make_world(0, SIZES["tiny"]))) == TINY_DIGEST


def test_names_are_of_characters_that_no_wording_has(world):
    graphs = (world.medicine, world.animals, world.known)
    named = {name[0] for graph in graphs for name in names_of(graph)}
    assert named <= set(coin_stems(random.Random(0)))
    passages = (*played(world), *world.general)
    texts = (*passages, *world.textbook, *world.textbook_heldout)
    unnamed = "".join(d.text for d in texts)
    for name in named:
        unnamed = unnamed.replace(name, "")
    assert not set(coin_stems(random.Random(0))) & set(unnamed)


def test_other_seeds_give_other_names():
    one, other = make_world(0, SIZES["tiny"]), make_world(1, SIZES["tiny"])
    shared = names_of(one.medicine) & names_of(other.medicine)
    assert len(shared) < 0.1 * len(names_of(one.medicine))


def test_answers_follow_from_the_facts(world):
    for item in exam_items(world):
        assert solve(world.medicine, item.question) == item.question.answers, item.question


def test_the_text_asks_for_the_right_number_of_letters(world):
    for item in exam_items(world):
        question = item.question
        asked = re.search(r"(\d)つ選べ", question.text)
        if not question.is_numeric:
            assert len(question.answers) == (int(asked.group(1)) if asked else 1)
            assert len(set(question.choices)) == 5


def test_every_needed_fact_is_a_sentence_of_the_textbook(world):
    for documents in (world.textbook, world.textbook_heldout):
        sentences = {s for d in documents for s in d.text.split("。")}
        stated = collections.defaultdict(set)
        for sentence in sentences:
            for character in sentence:
                stated[character].add(sentence)
        for relation, subject in {r for item in exam_items(world) for r in item.recalls}:
            objects = world.medicine.facts[relation, subject]
            assert any(subject in s and all(o in s for o in objects) for s in stated[subject[0]]), (
                relation,
                subject,
                objects,
            )


def test_explanations_go_through_all_choices_and_end_in_the_answer(world):
    for item in exam_items(world):
        question = item.question
        for letter in question.letters:
            assert f"。{letter} " in f"。{question.explanation}"
        last = question.explanation.rstrip("。").split("。")[-1]
        if question.is_numeric:
            assert f"＝{question.answers[0]}と" in last
        else:
            assert last.endswith(f"のは{'と'.join(question.answers)}である")


def test_explanations_recall_facts_that_they_state(world):
    facts = world.medicine.facts
    for item in exam_items(world):
        for relation, subject in item.recalls:
            assert subject in item.question.explanation
            # Shared signs that do fit go without saying.
            stated = [o for o in facts[relation, subject] if o in item.question.explanation]
            assert stated or (relation, item.ask.kind) == ("shared", "診断")


def test_splits_share_no_question_and_no_cell(world):
    asked = {
        split: {(i.question.text, frozenset(i.question.choices)) for i in items}
        for split, items in world.exam.items()
    }

    def name_cell(ask):
        # Questions about one cause, condition or gauge differ in their choices only.
        half = [world.medicine.alike[ask.key] in h for h in world.medicine.halves]
        return (
            ask.kind,
            tuple(half),
            ask.given if ask.kind in ("原因", "禁忌薬", "検査") else ask.key,
        )

    cells = {split: {name_cell(i.ask) for i in items} for split, items in world.exam.items()}
    for one, other in (("train", "dev"), ("train", "test"), ("dev", "test")):
        assert not asked[one] & asked[other]
        assert not cells[one] & cells[other]
    assert all(len(asked[s]) == len(items) for s, items in world.exam.items())


def test_sections_d_to_f_need_no_fact_that_training_questions_give_away(world):
    given_away = {fact for item in world.exam["train"] for fact in item.recalls}
    unseen = [i for s in ("dev", "test") for i in world.exam[s] if i.question.section in "DEF"]
    assert {i.question.section for i in world.exam["train"]} == set("ABC")
    assert unseen
    assert not any(given_away & set(i.recalls) for i in unseen)
    assert any(i.question.section in "ABC" for i in world.exam["test"])


def test_general_text_knows_nothing_of_the_exam(world):
    general = "".join(d.text for d in (*played(world), *world.general))
    general += "".join(d.text + "".join(d.choices) for d in world.demonstrations)
    assert not [name for name in names_of(world.medicine) if name in general]
    textbook = "".join(d.text for d in (*world.textbook, *world.textbook_heldout))
    taught = names_of(world.animals) | names_of(world.known)
    assert not [name for name in taught if name in textbook]
    assert not [n for n in taught for m in names_of(world.medicine) if n in m]


def test_general_text_teaches_both_answer_formats_and_few_shot_layouts(quick):
    texts = [d.text for d in quick.general]
    assert sum(bool(re.search(r"答え:\n[a-e](,[a-e])*$", t)) for t in texts) > 50
    assert sum(bool(re.search(r"考察:.+\n答え: [a-e](,[a-e])*$", t)) for t in texts) > 50
    asked = [t for t in texts if "問題: " in t]
    for graph in (quick.animals, quick.known):
        assert len([t for t in asked if any(s in t for s in graph.subjects)]) > len(asked) / 4
    for format_ in (OFFICIAL_V1, EXPLAIN_V1):
        question = quick.exam["dev"][0].question
        head = format_.render(question, quick.demonstrations).split(question.text)[0]
        assert any(t.startswith(head) for t in texts)
    assert [len(d.answers) for d in quick.demonstrations] == [1, 2, 1]


def test_copies_say_everything_twice(world):
    assert {len(texts) for texts in world.games.values()} == {world.size.games}
    stems = set(coin_stems(random.Random(0)))
    for document in world.games["copies"]:
        said = [character for character in document.text if character in stems]
        assert said and said[: len(said) // 2] == said[len(said) // 2 :]


def test_games_are_won_by_reading(world):
    words = make_words(sorted({name[0] for name in world.medicine.names}))
    rng = random.Random(0)
    for _ in range(300):
        password, *verdicts = tell_comparison(rng, words).removesuffix("。").split("。")
        password = password.removeprefix("合い言葉は").removesuffix("である")
        assert len(verdicts) > 3
        for verdict in verdicts:
            said, judged = verdict.split("であり、")
            assert judged == judge(said == password)
        *verdicts, ending = tell_choice(rng, words).removesuffix("。").split("。")
        negated = ending.startswith("当てはまらない")
        wanted = [v[0] for v in verdicts if v.endswith("当てはまらない") == negated]
        assert ending.removesuffix("である").split("のは")[1].split("と") == wanted != []


def test_riddles_hold_their_answers(world):
    words = make_words(sorted({name[0] for name in world.medicine.names}))
    rng = random.Random(0)
    for _ in range(300):
        riddle = make_riddle(rng, words)
        if riddle.text.startswith("最も大きい"):
            wanted = {max(riddle.choices, key=int)}
        else:
            word, asked = re.match(r"(.+)と(同じ|異なる)言葉はどれか。", riddle.text).groups()
            wanted = {c for c in riddle.choices if (c == word) == (asked == "同じ")}
        letters = tuple(x for x, c in zip("abcde", riddle.choices, strict=True) if c in wanted)
        assert riddle.answers == letters != ()
        assert riddle.explanation.endswith(f"のは{'と'.join(letters)}である。")


def test_seals_are_judged_by_what_the_explanation_drew(world):
    words = make_words(sorted({name[0] for name in world.medicine.names}))
    rng = random.Random(0)
    for _ in range(300):
        riddle = make_seals(rng, words)
        wanted, asked = re.match(r"(.+)を印に(もつ|もたない)言葉はどれか。", riddle.text).groups()
        lines = read_lines(riddle.explanation)
        for letter, choice in zip(riddle.letters, riddle.choices, strict=True):
            word, seals = lines[letter].clause.split("の印は")
            has = set(seals.split("、")) == set(wanted.split("、"))
            assert (word, lines[letter].applies) == (choice, has)
            assert (letter in riddle.answers) == (has == (asked == "もつ"))
        assert follows(riddle.explanation)


def test_the_textbook_never_speaks_as_explanations_do(quick):
    clauses = {
        fill(template, subject, objects)
        for (relation, subject), objects in quick.medicine.facts.items()
        for template in [MEDICINE.clauses[relation]]
    }
    textbook = "".join(d.text for d in (*quick.textbook, *quick.textbook_heldout))
    assert not [clause for clause in clauses if clause in textbook]
    explanations = "".join(item.question.explanation for item in exam_items(quick))
    assert len([clause for clause in clauses if clause in explanations]) > 100
    spoken = {
        fill(template, subject, objects)
        for (relation, subject), objects in quick.animals.facts.items()
        for template in [ANIMALS.clauses[relation]]
        if relation == "own"
    }
    general = "".join(d.text for d in quick.general if "問題" not in d.text)
    assert len([clause for clause in spoken if clause in general]) > len(spoken) / 2


def test_no_question_is_in_any_training_text(world):
    text = "".join(d.text for d in (*world.general, *world.textbook, *world.textbook_heldout))
    for split in ("dev", "test"):
        assert not [i.question.id for i in world.exam[split] if i.question.text in text]


def test_heldout_text_uses_wordings_that_training_never_saw(quick):
    seen = {s for d in quick.textbook for s in d.text.split("。") if "架空" not in s}
    held = {s for d in quick.textbook_heldout for s in d.text.split("。") if "架空" not in s} - {""}
    assert not seen & held


def test_all_kinds_points_and_answer_counts_occur(quick):
    items = exam_items(quick)
    assert {i.question.category for i in items} == set(KINDS)
    assert {len(i.question.answers) for i in items if i.question.choices} == {1, 2, 3}
    numeric = [i for i in items if i.question.is_numeric]
    assert 0 < len(numeric) < 0.1 * len(items)
    assert {i.question.points for i in items if i.question.section in "BE"} == {1, 3}
    assert {i.question.points for i in items if i.question.section not in "BE"} == {1}


def test_prohibited_choices_are_wrong_and_banned_for_the_patient(quick):
    marked = [i for i in exam_items(quick) if i.question.kinki]
    assert len(marked) > 10
    for item in marked:
        question = item.question
        assert not set(question.kinki) & set(question.answers)
        for letter in question.kinki:
            choice = question.choices[question.letters.index(letter)]
            assert quick.medicine.facts["ban", choice][0] in question.text


def test_right_answers_are_dealt_evenly_over_the_letters(quick):
    for items in quick.exam.values():
        singles = [i.question.answers[0] for i in items if len(i.question.answers) == 1]
        counts = collections.Counter(a for a in singles if not a.isdecimal())
        assert max(counts.values()) - min(counts.values()) <= 1
        assert len(counts) == 5


def test_pairs_prefer_the_truth_to_one_misremembered_fact(world):
    for split, source in (("train", "train"), ("heldout", "dev")):
        questions = {i.question.id: i.question for i in world.exam[source]}
        pairs = world.pairs[split]
        assert len({p.id for p in pairs}) == len(pairs)
        explained = [p for p in pairs if p.id.endswith("-explain")]
        assert len(explained) > 0.95 * len(questions)
        assert len(explained) < len(pairs) < 2 * len(explained)
        for pair in pairs:
            question = questions[pair.id.split("-")[1]]
            wrong = extract(question, pair.rejected).answer
            assert extract(question, pair.chosen).answer == question.answers
            assert wrong != question.answers
            assert len(wrong) == len(question.answers)
            assert question.text in pair.prompt
        for pair in explained:
            question = questions[pair.id.split("-")[1]]
            assert pair.prompt == EXPLAIN_ZERO_SHOT_V1.render(question)
            assert pair.chosen.startswith(question.explanation)


def test_only_facts_tell_chosen_from_rejected(quick):
    """With names, numbers and letters blanked, no sentence is peculiar to rejected texts."""

    def shapes(texts):
        text = names.sub("_", "。".join(texts))
        return set(re.split("[。\n]", re.sub("(_、)+", "_、", re.sub("[0-9]+|[a-e]", "#", text))))

    names = re.compile("|".join(sorted(names_of(quick.medicine))))
    pairs = [p for p in quick.pairs["train"] if p.id.endswith("-explain")]
    assert shapes(p.rejected for p in pairs) <= shapes(p.chosen for p in pairs)


def test_one_exchanged_fact_can_change_the_answer_of_every_kind(quick):
    for kind in KINDS:
        item = next(i for i in exam_items(quick) if i.ask.kind == kind)
        found = set()
        for relation, subject in item.recalls:
            for other in quick.medicine.alike[subject]:
                graph = quick.medicine.misremember(relation, subject, other)
                if wrong := explain(graph, MEDICINE, item.ask):
                    found.add(wrong.answers)
        assert item.question.answers in found, kind
        assert len(found) > 1, kind


def test_look_alikes_share_all_signs_but_one(world):
    graph = world.medicine
    for half in graph.halves:
        for group in half:
            assert len({graph.facts["shared", s] for s in group}) == 1
            for relation in ("own", "remedy", "cause"):
                assert len({graph.facts[relation, s] for s in group}) == len(group)
    profiles = {(graph.facts["shared", s], graph.facts["own", s]) for s in graph.subjects}
    assert len(profiles) == len(graph.subjects)


def test_exam_directory_reads_back_as_written(tmp_path, world):
    root = write_world(tmp_path / "world", world)
    for split, year in SPLIT_YEARS.items():
        expected = [item.question for item in world.exam[split]]
        assert read_questions(root / "exam", years=[year]) == expected
    assert tuple(read_demonstrations(root / "exam")) == world.demonstrations


def test_text_and_pair_files_hold_the_world(tmp_path, world):
    root = write_world(tmp_path / "world", world)
    files = {
        "general": world.general,
        "textbook": world.textbook,
        "textbook_heldout": world.textbook_heldout,
        "pairs_train": world.pairs["train"],
        "pairs_heldout": world.pairs["heldout"],
    }
    for name, records in files.items():
        lines = (root / f"{name}.jsonl").read_text(encoding="utf-8").splitlines()
        assert [json.loads(line) for line in lines] == [dataclasses.asdict(r) for r in records]
    description = json.loads((root / "world.json").read_text(encoding="utf-8"))
    assert description["seed"] == 3
    assert "架空" in description["fictional"]
    assert description["size"] == dataclasses.asdict(world.size)
    assert description["questions"]["test"] == len(world.exam["test"])
    assert [p.name for p in tmp_path.iterdir()] == ["world"]


def test_a_world_already_there_is_reused_or_refused(tmp_path):
    world = make_world(0, SIZES["tiny"])
    root = write_world(tmp_path / "world", world)
    before = (root / "general.jsonl").stat().st_mtime_ns
    write_world(root, world)
    assert (root / "general.jsonl").stat().st_mtime_ns == before
    with pytest.raises(UserError, match="holds a world with seed 0, asked for 1"):
        write_world(root, make_world(1, SIZES["tiny"]))
    bigger = dataclasses.replace(SIZES["tiny"], everyday=11)
    with pytest.raises(UserError, match="size"):
        write_world(root, make_world(0, bigger))
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "notes.txt").write_text("mine")
    with pytest.raises(UserError, match="not a fictional world"):
        write_world(tmp_path / "other", world)
    (tmp_path / "empty").mkdir()
    assert digest(write_world(tmp_path / "empty", world)) == digest(root)


def test_a_failed_write_leaves_nothing_behind(tmp_path):
    world = make_world(0, SIZES["tiny"])
    broken = dataclasses.replace(world.exam["test"][-1].question, year=None)
    items = (*world.exam["test"][:-1], dataclasses.replace(world.exam["test"][-1], question=broken))
    bad = dataclasses.replace(world, exam={**world.exam, "test": items})
    with pytest.raises(ValueError, match="does not fit year None"):
        write_world(tmp_path / "world", bad)
    assert list(tmp_path.iterdir()) == []


def test_standard_world_is_large_enough_to_report_on():
    world = make_world(1, SIZES["standard"])
    assert len(world.exam["test"]) >= 1000
    assert len(world.medicine.subjects) >= 200


def test_seeds_below_a_thousand_are_for_tuning():
    assert [is_test_world(s) for s in (0, 999, 1000, 1001)] == [False, False, True, True]
    with pytest.raises(UserError, match="-1"):
        make_world(-1, SIZES["tiny"])


@pytest.mark.parametrize(
    ("field", "value"), [("diseases", 10), ("animals", 0), ("known", 30), ("variants", 0)]
)
def test_impossible_sizes_are_named(field, value):
    with pytest.raises(UserError, match=f"{field} is {value}"):
        dataclasses.replace(SIZES["tiny"], **{field: value})
    assert isinstance(SIZES["tiny"], Size)
