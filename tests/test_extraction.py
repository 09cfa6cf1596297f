"""The answer in a free text: a table of outputs as models write them, and what never happens."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rpo_jax.exams.extraction import extract
from rpo_jax.exams.igakuqa import Question

CHOICES = ("玉ねぎ", "人参ジュース", "じゃが芋", "B型肝炎ワクチン", "ビタミンC")
RIGHT = Question("1A1", "野菜について正しいのはどれか。", CHOICES, ("b",))
WRONG = Question("1A2", "野菜について誤っているのはどれか。", CHOICES, ("b",))
LIKELY = Question("1A3", "箱の中身として最も考えられるのはどれか。2つ選べ。", CHOICES, ("a", "c"))
IMAGE = Question("1A4", "図の矢印はどれか。", ("①", "②", "③", "④", "⑤"), ("c",))
EIGHT = Question("1A5", "何か。", tuple("いろはにほへとち"), ("h",))
NUMBER = Question("1A6", "蛋白量を求めよ。解答：①.②g/日", (), ("21",))
WHOLE = Question("1A7", "数を求めよ。解答：①②③/人口1,000対", (), ("100",))
PLAIN = Question("1A8", "薬の量は何mgか。", (), ("240",))

# Text to answer, as "ac"; "-" is none. A tuple adds how it was found.
LETTERS = {
    # An answer alone.
    "b": ("b", "alone"),
    " b ": "b",
    "\nb": "b",
    "\n\nb\n": "b",
    "B": "b",
    "ｂ": "b",
    "Ｂ": "b",
    "b.": "b",
    "b。": "b",
    "(b)": "b",
    "（ｂ）": "b",
    "「b」": "b",
    "【b】": "b",
    "**b**": "b",
    "`b`": "b",
    '"b"': "b",
    "bです": "b",
    "bです。": "b",
    "bである。": "b",
    "b: 人参ジュース": "b",
    "b. 人参ジュース": "b",
    "b 人参ジュース": "b",
    "b（人参ジュース）": "b",
    "b) 人参ジュース": "b",
    "b、人参ジュース": "b",
    "選択肢b": "b",
    "選択肢 b です。": "b",
    "bを選択する。": "b",
    "b (計算式は2×(na値+k値))": "b",
    "b<|endoftext|>": "b",
    "b</s>": "b",
    "$b$": "b",
    "\\text{b}": "b",
    # Several letters.
    "a,c": ("ac", "alone"),
    "a, c": "ac",
    "a、c": "ac",
    "ａ、ｃ": "ac",
    "ａ，ｃ": "ac",
    "a，c": "ac",
    "a・c": "ac",
    "a c": "ac",
    "a　c": "ac",
    "a/c": "ac",
    "a&c": "ac",
    "ac": "ac",
    "AC": "ac",
    "aとc": "ac",
    "aとcです。": "ac",
    "aおよびc": "ac",
    "a及びc": "ac",
    "a and c": "ac",
    "a, b, and d": "abd",
    "c,a": "ac",
    "a,c,e": "ace",
    "a､c｡": "ac",
    "a,e,e": "ae",
    "(a),(c)": "ac",
    "「a」と「c」": "ac",
    "[a, c]": "ac",
    "a: 玉ねぎ, c: じゃが芋": "ac",
    "a: 玉ねぎ\nc: じゃが芋": "ac",
    "a\nc": "ac",
    "a\nb\nc\nd\ne": "-",
    "a: 玉ねぎ\nb: 人参ジュース\nc: じゃが芋\nd: B型肝炎ワクチン\ne: ビタミンC": "-",
    # A label.
    "答え: b": ("b", "label"),
    "答え:b": "b",
    "答え：ｂ": "b",
    "答え： b": "b",
    "答え:\nb": "b",
    "答え:\n\nb": "b",
    "答え b": "b",
    "答え\nb": "b",
    "解答: b": "b",
    "回答：b": "b",
    "正解: b": "b",
    "正答：b": "b",
    "最終的な答え: b": "b",
    "最終回答：b": "b",
    "【答え】b": "b",
    "【答え】 b": "b",
    "**答え:** b": "b",
    "**答え: b**": "b",
    "### 答え\nb": "b",
    "答え: (b)": "b",
    "答え: 「b」": "b",
    "答え: b, d": "bd",
    "答え: bとd": "bd",
    "答え: bd": "bd",
    "答え: b,d,e": "bde",
    "答え: b.": "b",
    "答え: b。": "b",
    "答え: b です": "b",
    "答え: bになります。": "b",
    "答えの記号: b": "b",
    "考察: 人参は甘い。\n答え: b": "b",
    "玉ねぎは辛い。人参が正しい。\n答え: b": "b",
    "a 誤り。b 正しい。c 誤り。d 誤り。e 誤り。\n答え: b": "b",
    "a: 誤り。\nb: 正しい。\nc: 誤り。\n答え: b": "b",
    "ａ　誤り。ｂ　正しい。\n答え：ｂ": "b",
    "人参は根である。したがって正解はbである。\n答え: b": "b",
    "答え: b: 人参ジュース": "b",
    "答え: b（人参ジュース）": "b",
    "答え: b. 人参ジュース": "b",
    # English, JSON, LaTeX, tags.
    "Answer: b": "b",
    "Answer: B": "b",
    "The answer is B.": ("b", "phrase"),
    "The correct answer is (b).": "b",
    "The answer is option b": "b",
    "Final answer: b": "b",
    "The answers are a and c.": "ac",
    "A carrot is a root.\nAnswer: b": "b",
    "Therefore, b.": "b",
    '{"answer": "b"}': "b",
    '{"answer": ["a", "c"]}': "ac",
    '{"explanation": "人参", "answer": "b"}': "b",
    '{"答え": "b"}': "b",
    '```json\n{"answer": "b"}\n```': "b",
    "\\boxed{b}": "b",
    "$\\boxed{\\text{b}}$": "b",
    "<answer>b</answer>": "b",
    # A phrase.
    "正解はb": ("b", "phrase"),
    "正解はbです。": "b",
    "正解は選択肢bです。": "b",
    "答えはbである。": "b",
    "答えは、bです。": "b",
    "正しい答えはbです。": "b",
    "正解は b: 人参ジュース です。": "b",
    "正解はaとcです。": "ac",
    "bが正解です。": "b",
    "bが正解である。": "b",
    "aとcが正解。": "ac",
    "選択肢bが正しい。": "b",
    "bを選ぶ。": "b",
    "以上からbを選択する。": "b",
    "正しいのはbである。": "b",
    "正しいのは、b: 人参ジュースです。": "b",
    "よって、b。": "b",
    "したがってbが正しい。": "b",
    "以上より、bとなる。": "b",
    "玉ねぎは辛い。よって正解はb。": "b",
    "答えはaではなくbです。": "b",
    "正解はaではない。": "-",
    "「b: 人参ジュース」が最も考えられると思われます。": "b",
    "画像はありませんが、最も可能性が高いのはc: じゃが芋です。": "c",
    # The text of a choice instead of a letter.
    "人参ジュース": ("b", "alone"),
    "人参ジュースです。": "b",
    "答え: 人参ジュース": "b",
    "答え: 玉ねぎ、じゃが芋": "ac",
    "正解は人参ジュースです。": "b",
    "B型肝炎ワクチン": "d",
    "答え: B型肝炎ワクチン": "d",
    "答え: ビタミンＣ": "e",
    "ﾋﾞﾀﾐﾝC": "e",
    "答え: 「人参 ジュース」": "b",
    # The answer first, then an explanation.
    "b\n解説: 人参は甘い。": "b",
    "b\n\n人参が正しい。玉ねぎは辛い。": "b",
    "答え: b\n解説: aは辛い。cは土の味がする。": "b",
    "答え: b\n理由: 正解はbである。": "b",
    # Run-on.
    "b\n問題: 空の色はどれか。\na: 青\nb: 赤\n答え: a": "b",
    "答え: b\n\n問題: 次の問題。\n答え: d": "b",
    "答え: b\n問2 海の色は。\n答え: d": "b",
    "答え: b\nQuestion: What?\nAnswer: d": "b",
    "答え: b\n必ずa,b,c,d,eの中からちょうど1個選んでください。\n答え:\nd": "b",
    "答え: b\nuser: もう一問\nassistant: 答え: d": "b",
    "答え: b<|endoftext|>医師国家試験を解きます。\n答え: d": "b",
    "答え: b<|im_end|>\n<|im_start|>user\n答え: d": "b",
    "人参は甘い。\n問題: 空の色は。\n答え: d": "-",
    "問題: 空の色は。\n答え: d": "-",
    "問題: 野菜について正しいのはどれか。\na: 玉ねぎ\nb: 人参ジュース\n"
    "必ずa,b,c,d,eの中からちょうど1個選んでください。\n答え: b": "b",
    "assistant: 答え: b": "b",
    # Repeated, revised, contradicting.
    "答え: b\n答え: b": "b",
    "答え: a\nいや、考え直すと人参である。\n答え: b": "b",
    "答え: a\n訂正します。答え: b": "b",
    "答え: a\n最終的な答え: b": "b",
    "答え: a\n見直したところ、やはりbが正解です。": "b",
    "Answer: a\nWait, actually the answer is b.": "b",
    "答え: a\n答え: b": ("-", "conflict"),
    "正解はaです。正解はbです。": ("-", "conflict"),
    "a\n人参は甘い。\nc": ("-", "conflict"),
    "答え: aまたはb": ("-", "conflict"),
    "答え: a or b": ("-", "conflict"),
    "正解はaかbです。": ("-", "conflict"),
    "答え: b: 玉ねぎ": ("-", "conflict"),
    "答え: b\n正解はcとする説もある。": "b",
    # Too few or too many letters are what the model said.
    "答え: a,b,c,d": "abcd",
    # Letters that the question does not have.
    "f": ("-", "unknown"),
    "答え: f": ("-", "unknown"),
    "答え: a,f": ("-", "unknown"),
    "答え: z": ("-", "unknown"),
    # No answer.
    "": ("-", "nothing"),
    "   \n": "-",
    "。": "-",
    "答え:": "-",
    "答え: ": "-",
    "わかりません。": "-",
    "答え: わかりません": "-",
    "答え: {答え}": "-",
    "答え: ○": "-",
    "該当なし": "-",
    "申し訳ありませんが、画像がないため回答できません。": "-",
    "I cannot answer this question without the image.": "-",
    "a: 正しい。b: 誤り。c: 誤り。": "-",
    "aは誤りである。bは甘い。": "-",
    "写真(a)と組織像(b)が提示されていないため診断できません。": "-",
    "答え: ct検査": "-",
    "答え: d-dimer": "-",
    "答え: a〜c": "-",
    "正しいのはどれか。": "-",
    "全て正しい。": "-",
    "必ずa,b,c,d,eの中からちょうど1個選んでください。": "-",
    "1": "-",
    "答え: 2": "-",
    "bだけでは足りない。": "-",
    "Because a carrot is a root.": "-",
}
OTHERS = [
    (WRONG, "誤っているのはbである。", "b"),
    (WRONG, "正しいのはa、c、d、eである。誤っているのはbである。", "b"),
    (WRONG, "正しいのはa、c、d、eである。", "-"),
    (WRONG, "bが誤っている。", "b"),
    (WRONG, "最も考えられるのはaである。\n答え: b", "b"),
    (LIKELY, "最も考えられるのはaとcである。", "ac"),
    (LIKELY, "a", "a"),
    (LIKELY, "答え: a,b,c", "abc"),
    (LIKELY, "aとcが最も考えられる。", "ac"),
    (IMAGE, "③", "c"),
    (IMAGE, "答え: ③", "c"),
    (IMAGE, "c: ③", "c"),
    (IMAGE, "3", "-"),
    (IMAGE, "答え: ①と②", "ab"),
    (EIGHT, "答え: h", "h"),
    (EIGHT, "f,g", "fg"),
    (EIGHT, "i", "-"),
]
NUMBERS = [
    (NUMBER, "2.1", "2.1"),
    (NUMBER, "２．１", "2.1"),
    (NUMBER, "2.1g/日", "2.1"),
    (NUMBER, "2.1 g/日です。", "2.1"),
    (NUMBER, "約2.1g/日", "2.1"),
    (NUMBER, "答え: 2.1g/日", "2.1"),
    (NUMBER, "答え：２．１ｇ／日", "2.1"),
    (NUMBER, "①2 ②1", "2.1"),
    (NUMBER, "①＝2、②＝1", "2.1"),
    (NUMBER, "答え: ①2 ②1", "2.1"),
    (NUMBER, "①2.1 ②g/日", "2.1"),
    (NUMBER, "①163\n②27.3", "-"),
    (NUMBER, "82×2.5÷100=2.05\n四捨五入して2.1\n答え: 2.1g/日", "2.1"),
    (NUMBER, "答え: 82×2.5/100=2.05", "2.05"),
    (NUMBER, "答えは2.1である。", "2.1"),
    (NUMBER, "よって、2.1g/日。", "2.1"),
    (NUMBER, "21", "21"),
    (NUMBER, "答え: 2〜3", "-"),
    (NUMBER, "答え: 1/2", "-"),
    (NUMBER, "答え: 2.1 または 3.5", "-"),
    (NUMBER, "答え: 2.1\n答え: 3.5", "-"),
    (NUMBER, "計算できません。", "-"),
    (NUMBER, "b", "-"),
    (NUMBER, "2.1\n問題: 次。\n答え: 7", "2.1"),
    (WHOLE, "10.0/人口1,000対", "10.0"),
    (WHOLE, "100", "100"),
    (WHOLE, "1,000", "1000"),
    (PLAIN, "240", "240"),
    (PLAIN, "答え: 240mg", "240"),
    (PLAIN, "4×60＝240となる。\n答え: 240", "240"),
    (PLAIN, "-5", "-5"),
]


def check(question: Question, text: str, expected: str | tuple[str, str]) -> None:
    letters, found = expected if isinstance(expected, tuple) else (expected, "")
    extraction = extract(question, text)
    if question.is_numeric:
        wanted = () if letters == "-" else (letters,)
    else:
        wanted = () if letters == "-" else tuple(letters)
    assert extraction.answer == wanted, extraction
    assert not found or extraction.found == found


@pytest.mark.parametrize("text", LETTERS)
def test_letters(text):
    check(RIGHT, text, LETTERS[text])


@pytest.mark.parametrize(("question", "text", "expected"), OTHERS)
def test_the_question_says_how_to_read(question, text, expected):
    check(question, text, expected)


@pytest.mark.parametrize(("question", "text", "expected"), NUMBERS)
def test_numbers(question, text, expected):
    check(question, text, expected)


def test_the_table_is_as_large_as_promised():
    assert len(LETTERS) + len(OTHERS) + len(NUMBERS) >= 150


GOING_ON = {
    "b": (False, False),
    "bです。": (False, False),
    "答え: b: 人参ジュース": (False, False),
    "人参は甘い。\n答え: b": (False, False),
    "人参は甘い。正解はbである。\n答え: b": (False, False),
    '{"answer": "b"}': (False, False),
    "b\n解説: 人参は甘い。": (True, False),
    "答え: b\n答え: b": (True, False),
    "答え: b\n\n問題: 空の色は。": (True, True),
    "答え: b<|endoftext|>空": (True, True),
    "答え: b\nuser: もう一問": (True, True),
    "人参は甘い。\n問題: 空の色は。": (True, True),
    "人参は甘い。": (False, False),
}


@pytest.mark.parametrize("text", GOING_ON)
def test_whether_the_text_went_on(text):
    extraction = extract(RIGHT, text)
    assert (extraction.went_on, extraction.run_on) == GOING_ON[text]


PIECES = """
    答え 正解は : ： と 、 , が正解 よって 問題: user: ③ ① ２ . 7 = ( 」 ** \\boxed{ <answer>
    でなく または 訂正 じゃない { ⟨1⟩ 必ずa,b,c,d,eの中から a b c d e f z A B ｂ 玉ねぎ 人参ジュース
    B型肝炎ワクチン <|endoftext|>"""
TEXTS = st.one_of(
    st.text(), st.lists(st.sampled_from([*PIECES.split(), " ", "\n"]), max_size=12).map("".join)
)


@settings(max_examples=400, deadline=None)
@given(text=TEXTS, question=st.sampled_from([RIGHT, WRONG, LIKELY, IMAGE, EIGHT, NUMBER, WHOLE]))
def test_no_text_crashes_it_and_no_letter_is_invented(text, question):
    extraction = extract(question, text)
    if question.is_numeric:
        assert len(extraction.answer) <= 1
        assert all(float(number) is not None for number in extraction.answer)
    else:
        assert set(extraction.answer) <= set(question.letters)
        assert list(extraction.answer) == sorted(set(extraction.answer))
    assert bool(extraction.answer) == (extraction.found in ("label", "phrase", "alone"))
    assert extraction.went_on or not extraction.run_on
    assert extract(question, text) == extraction


def test_the_gold_is_never_looked_at():
    for text in ("答え: a", "正解はaとb", "aが正解", "人参ジュース", ""):
        seen = {
            extract(Question("1A1", RIGHT.text, CHOICES, gold), text)
            for gold in (("a",), ("b",), ("a", "b"), ("c", "d", "e"))
        }
        assert len(seen) == 1
