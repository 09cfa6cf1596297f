"""The report: rebuilt from raw answers, honest about slices, and readable in a browser."""

import html.parser
import json
import os
import re
import shutil
import subprocess
import tempfile
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest

from rpo_jax import cli
from rpo_jax.errors import UserError
from rpo_jax.evaluate import main
from rpo_jax.exams.asking import ANSWER_ONLY, MODES, choose_questions, open_sitting
from rpo_jax.exams.exam import find_exam
from rpo_jax.exams.page import render_page
from rpo_jax.exams.report import build_report, find_published, write_report
from rpo_jax.exams.tables import format_report, format_table
from tests.sittings import make_exam, plan_sitting, sit

EXAM = find_exam("fictional")
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("chrome")


def forgets_when_explaining(mode: str, seed: int, place: int) -> bool:
    return place % 4 != 0 if mode == ANSWER_ONLY else place % 4 == 1 or (place + seed) % 8 == 0


@pytest.fixture(scope="module")
def exam(tmp_path_factory) -> tuple:
    return make_exam(tmp_path_factory.mktemp("exam"))


@pytest.fixture(scope="module")
def folders(tmp_path_factory, exam) -> list[Path]:
    root = tmp_path_factory.mktemp("sittings")
    directory, questions = exam
    one = sit(root / "a", directory, questions, forgets_when_explaining, (0, 1, 2), "<b>bold</b>")
    other = sit(root / "b", directory, questions, lambda *_: True, name="perfect")
    return [one, other]


@pytest.fixture(scope="module")
def report(folders) -> dict:
    return write_report(EXAM, folders)


def test_points_and_comparison_are_those_of_the_answers(report, exam):
    _, questions = exam
    model, perfect = report["models"]
    short = sum(q.points for place, q in enumerate(questions) if place % 4)
    assert model["modes"]["answer_only"]["points"]["extracted"]["values"] == [short] * 3
    assert model["modes"]["answer_only"]["points"]["official"]["mean"] == short
    long = [
        sum(q.points for place, q in enumerate(questions) if forgets_when_explaining("", s, place))
        for s in range(3)
    ]
    assert model["modes"]["explain_first"]["points"]["extracted"]["values"] == long
    difference = sum(long) / 3 - short
    assert model["comparison"]["points"]["difference"] == pytest.approx(difference)
    assert model["comparison"]["points"]["low"] < difference < model["comparison"]["points"]["high"]
    flips = model["comparison"]["flips"]["category"]
    lost = [test["lost"] for test in model["comparison"]["mcnemar"]]
    assert sum(found["lost"] for found in flips.values()) == pytest.approx(sum(lost) / 3)
    assert model["modes"]["answer_only"]["vote"]["points"] == short
    assert model["modes"]["answer_only"]["agreement"] == 1.0
    assert perfect["comparison"]["points"] == {"difference": 0.0, "low": 0.0, "high": 0.0}
    assert {flip["kind"] for flip in model["flips"]} == {"lost", "gained"}


def test_later_models_are_compared_with_the_first_question_by_question(report, folders, exam):
    _, questions = exam
    name = report["models"][0]["name"]
    short, long = report["comparisons"]
    assert [(x["model"], x["against"]) for x in (short, long)] == [("perfect", name)] * 2
    assert [x["mode"] for x in (short, long)] == ["answer_only", "explain_first"]
    wrong = [q.points for place, q in enumerate(questions) if place % 4 == 0]
    assert short["points"]["difference"] == sum(wrong)
    assert short["points"]["low"] < sum(wrong) < short["points"]["high"]
    (test,) = short["mcnemar"]
    assert (test["lost"], test["gained"]) == (0, len(wrong))
    assert test["p_value"] == pytest.approx(2 * 0.5 ** len(wrong))
    shown = format_report(report, Path("x"))
    (line,) = [
        x for x in shown.splitlines() if x.startswith(f"perfect against {name}, answer_only")
    ]
    total = sum(question.points for question in questions)
    assert f": +{sum(wrong)} points (95% " in line
    assert f"), +{sum(wrong) / total:.1%} of all; " in line
    page = Page((folders[0] / "comparison.html").read_text(encoding="utf-8")).text
    assert "Model against model" in page and f"+{sum(wrong):.1f}" in page
    other = build_report(EXAM, [folders[0]])
    assert other["comparisons"] == [] and "Model against model" not in render_page(other)


def test_it_is_rebuilt_from_the_answers_alone(capsys, folders, report):
    names = ("comparison.json", "comparison.html")
    stored = [(folders[0] / name).read_bytes() for name in names]
    for name in names:
        (folders[0] / name).unlink()
    with cli.exit_on_error():
        main(["--report", *map(str, folders), "--json"])
    assert json.loads(capsys.readouterr().out) == json.loads(json.dumps(report))
    assert [(folders[0] / name).read_bytes() for name in names] == stored


def test_what_compares_models_leaves_their_own_reports(capsys, tmp_path, exam):
    directory, questions = exam
    one, other = (sit(tmp_path / x, directory, questions, lambda *_: True) for x in "ab")
    write_report(EXAM, [one])
    own = {path.name: path.read_bytes() for path in one.glob("report.*")}
    with cli.exit_on_error():
        main(["--report", str(one), str(other)])
        assert f"report: {one}/comparison.html" in capsys.readouterr().out
        main(["--report", str(one), str(other), "--out", f"{tmp_path}/new/both"])
        assert f"report: {tmp_path}/new/both/comparison.html" in capsys.readouterr().out
    assert len(own) == 2 and own == {path.name: path.read_bytes() for path in one.glob("report.*")}
    assert (tmp_path / "new/both/comparison.html").read_bytes() == (
        one / "comparison.html"
    ).read_bytes()
    assert not list(other.glob("*.html"))


def test_the_terminal_table_has_a_line_a_mode(report):
    shown = format_report(report, Path("runs/a/report"))
    for part in ("answer_only", "explain_first", "perfect", "McNemar p = ", "runs/a/report.html"):
        assert part in shown
    assert "vote: points" in shown and "went-on" not in shown
    assert format_table([["公衆衛生", "1"], ["ab", "20"]]) == "公衆衛生   1\nab        20"


class Page(html.parser.HTMLParser):
    """Collects tags, attributes and text, and checks that tags nest."""

    def __init__(self, text: str):
        super().__init__()
        self.open: list[str] = []
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str | None]] = []
        self.text = ""
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += attrs
        if tag not in ("meta", "line"):
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += attrs

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text += data


def test_the_page_is_whole_and_needs_nothing_else(folders, report):
    source = (folders[0] / "comparison.html").read_text(encoding="utf-8")
    page = Page(source)
    assert not page.open
    assert page.tags.count("h1") == page.tags.count("title") - page.tags.count("svg") == 1
    assert page.tags.count("svg") == 3  # points, differences, flips (of one model)
    assert not {"script", "link", "img", "iframe", "b"} & set(page.tags)
    assert not [a for a, _ in page.attributes if a in ("src", "href", "onload", "onclick")]
    assert "url(" not in source and "@import" not in source
    assert "prefers-color-scheme: dark" in source
    assert "<b>bold</b>" in page.text and "&lt;b&gt;bold&lt;/b&gt;" in source
    for part in ("answer only", "explain first", "McNemar", "points", "not decided"):
        assert part in page.text
    for model in report["models"]:
        shown = f"{model['comparison']['points']['difference']:+.1f} points".replace("-", "−")
        assert shown in " ".join(page.text.split())


def test_the_exams_rules_are_told_of_every_mode(report):
    rules = render_page(report).split("own rules</h2>")[1].split("</table>")[0]
    rows = [" ".join(Page(row).text.split()) for row in re.findall("<tr>.*?</tr>", rules, re.S)]
    assert [row.split(", seed")[0] for row in rows[1:]] == [
        f"{model['name']}{mode}"
        for model in report["models"]
        for mode in ("answer only", "explain first")
    ]


def test_every_bar_lies_inside_its_plot(folders, report):
    source = (folders[0] / "comparison.html").read_text(encoding="utf-8")
    for plot in re.findall(r"<svg.*?</svg>", source, re.DOTALL):
        width, height = map(float, re.search(r'viewBox="0 0 (\S+) (\S+)"', plot).groups())
        boxes = re.findall(r'<rect [^>]*x="(\S+)" y="(\S+)" width="(\S+)" height="(\S+)"', plot)
        for x, y, w, h in (map(float, box) for box in boxes):
            assert x >= 0 and x + w <= width and y >= 0 and y + h <= height and w >= 0


@pytest.mark.full
@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium here")
def test_a_browser_shows_it_in_light_and_dark(tmp_path, folders, report):
    def browse(*flags: str) -> subprocess.CompletedProcess:
        command = [CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", *flags]
        command += ["--disable-dev-shm-usage", f"--user-data-dir={tempfile.mkdtemp(dir=tmp_path)}"]
        url = (folders[0] / "comparison.html").absolute().as_uri()
        home = {**os.environ, "HOME": str(tmp_path)}
        return subprocess.run(
            [*command, url],
            capture_output=True,
            timeout=600,
            env=home,
            check=True,
        )

    shown = browse("--dump-dom").stdout.decode()
    assert "</html>" in shown and shown.count("<svg") == 3
    assert "<table" in shown and "McNemar" in shown
    import matplotlib.image

    for scheme, setting, paper, bars in (
        ("light", 1, (255, 255, 255), (9, 105, 218)),
        ("dark", 0, (13, 17, 23), (68, 147, 248)),
    ):
        path = tmp_path / f"{scheme}.png"
        browse(f"--screenshot={path}", f"--blink-settings=preferredColorScheme={setting}")
        pixels = (255 * matplotlib.image.imread(path)[..., :3]).round().astype(int).tolist()
        seen = Counter(tuple(pixel) for row in pixels for pixel in row)
        assert seen.most_common(1)[0][0] == paper and seen[bars] > 500


def test_a_slice_says_so_and_shows_no_published_totals(tmp_path, exam):
    directory, questions = exam
    few = choose_questions(questions, 7)
    folder = sit(tmp_path / "few", directory, few, lambda *_: True)
    found = build_report(EXAM, [folder])
    assert found["questions"] == {
        "asked": 7,
        "of": len(questions),
        "points": sum(question.points for question in few),
    }
    assert found["published"] == {}
    assert "a slice: totals are of the questions asked" in render_page(found)


def test_one_mode_alone_has_no_comparison(tmp_path, exam):
    directory, questions = exam
    folder = sit(tmp_path / "one", directory, questions, lambda *_: True)
    (folder / "responses" / "explain_first-0.jsonl").unlink()
    found = build_report(EXAM, [folder])
    assert found["models"][0]["comparison"] is None
    assert Page(render_page(found)).tags.count("svg") == 1


def test_what_does_not_fit_is_refused(tmp_path, exam, folders):
    directory, questions = exam
    unfinished = sit(tmp_path / "unfinished", directory, questions, lambda *_: True)
    path = unfinished / "responses" / "explain_first-0.jsonl"
    path.write_bytes(b"".join(path.read_bytes().splitlines(keepends=True)[:-2]))
    with pytest.raises(
        UserError, match=r"explain_first, seed 0: 2 of \d+ questions have no answer"
    ):
        build_report(EXAM, [unfinished])
    path.unlink()
    both = replace(plan_sitting(directory, questions), modes=MODES)
    open_sitting(unfinished, both)
    with pytest.raises(UserError, match="unfinished: explain_first has no answers yet; the comm"):
        build_report(EXAM, [unfinished])
    few = sit(tmp_path / "few", directory, questions[:5], lambda *_: True)
    with pytest.raises(UserError, match="other questions than"):
        build_report(EXAM, [folders[0], few])
    with pytest.raises(UserError, match="the exam changed since it was asked"):
        build_report(EXAM, [few])
    with pytest.raises(UserError, match="a sitting of --exam fictional, not of igakuqa"):
        build_report(find_exam("igakuqa"), folders)
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="holds no sitting"):
        build_report(EXAM, [tmp_path / "empty"])
    open_sitting(tmp_path / "empty", plan_sitting(directory, questions))
    with pytest.raises(UserError, match="nothing was asked yet"):
        build_report(EXAM, [tmp_path / "empty"])


def test_published_totals_stand_beside_ours_on_whole_years(igakuqa_dir):
    exam = find_exam("igakuqa")
    found = find_published(exam, (2018, 2019, 2020, 2021, 2022))
    assert found["Preferred-MedLLM-Qwen-72B"]["points"] == 2156
    assert find_published(exam, (2022,))["Qwen2.5-72B"]["points"] == 399
    assert find_published(exam, (2017,)) == {}
