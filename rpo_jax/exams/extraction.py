"""The answer that a free text gives, how it was found, and whether the text went on after it.

Nothing is guessed. A text states an answer by a label (``答え: b``), by a phrase (``bが正解``), or
by standing alone on a line; letters, the texts of choices and numbers are read alike. Where
statements of the strongest kind contradict each other, and none says that it revises the others,
there is no answer. What follows an invented next question is never read.

Source: ours; the kinds of statement were collected from published outputs of six models.
"""

import functools
import re
import unicodedata
from collections.abc import Iterator
from dataclasses import dataclass

from rpo_jax.exams.igakuqa import Question
from rpo_jax.exams.numbers import SLOTS, Slots, find_slots, read_number


@dataclass(frozen=True)
class Extraction:
    """What a text answers.

    Attributes:
        answer: the letters, sorted, each one of the question's; or one number; empty: none.
        found: ``label``, ``phrase`` or ``alone``; without an answer ``nothing``, ``conflict`` (with
            itself, or a hedge like "a or b") or ``unknown`` (a letter that the question lacks).
        went_on: whether anything follows the answer (of no answer: whether there was a run-on).
        run_on: whether the text goes on into another question or turn.
    """

    answer: tuple[str, ...]
    found: str
    went_on: bool
    run_on: bool


@dataclass(frozen=True)
class _Claim:
    """One statement of an answer: where it lies, and what it says; no answer: why not."""

    start: int
    end: int
    answer: tuple[str, ...]
    kind: str
    problem: str = ""


# How an answer is announced. Texts are normalised before: half-width, lower case, no markup.
_WORD = r"(?:答え?|こたえ|解答|回答|正解|正答|answer|ans)"
_CLOSE = r"[)\"'」』】\]>}]*"
_LABEL = re.compile(
    rf"(?<![a-z])\"?{_WORD}(?:の?(?:記号|番号|選択肢))?[ ]?{_CLOSE}\s*[:=]\s*(?:は\s*)?"
    rf"|^\W*(?:最終)?{_WORD}{_CLOSE}\s+|[【\[<]{_WORD}[】\]>]\s*|\\boxed\s*\{{\s*",
    re.MULTILINE,
)
_SAYS = (
    rf"{_WORD}(?:として)?(?:は|が|となるのは|になるのは|である)\s*[、,:]?\s*"
    r"|answers?\s+(?:is|are|would be|should be|must be)\s*:?\s*"
)
_SO = re.compile(
    r"(?:よって|したがって|従って|以上から|以上より|以上のことから|ゆえに|therefore|thus|hence)"
    r"\s*[、,:]?\s*"
)
_SO_END = re.compile(
    r"\s*(?:。|\.?\s*$|\.?\s*\n|です|である|だ。|となる|が正|が答|を選|を正|と考え)"
)
_LIKELY = "(?:最|もっと)も(?:可能性が高い|考えられる|適切な|適当な|疑われる)"
_NOUN = "[一-龠々ァ-ヶー]+"
_NEGATIVE = re.compile("ない|誤|低い|否定|禁忌|まれ|稀")

# What a list of letters is made of, and what may follow it.
_OPEN = re.compile(r"[(\"'「『【\[<{ ]|選択肢の?|(?:options?|choices?)(?![a-z])")
_LETTERS = re.compile(r"(?<![a-z0-9])[a-z]+(?![a-z0-9])")
_TOLD = re.compile(r"[ ]*[:.)、(「』」\]-]*[ ]*[(「]*")  # between a letter and its choice's text
_CLOSED = re.compile(_CLOSE)
_JOINT = r"[ ]*(?:,[ ]*and(?= )|,|、|・|/|&|\+|;|と|や|及び|および|ならびに|and(?= ))[ ]*"
_SEPARATOR = re.compile(rf"{_JOINT}|[ ]+")
_HEDGE = re.compile(r"[ ]*(?:or\b|または|又は|もしくは|あるいは|か[ ]*[a-z](?![a-z]))")
_DENIED = re.compile(r"\s*(?:では?|じゃ)(?:な[くい]|ありません)|以外|[ ]*の(?:中|うち)|[ ]*から")
_INSTEAD = re.compile(r"\s*(?:では?|じゃ)なく[、,]?\s*")
_END = re.compile(
    r"$|[\s。!?=|(「『【<)\"'」』】\]>}:]|\.(?![a-z0-9])|です|でし|であ|で[、,。]|だ(?!け)|が|を|は|に|も|番"
    rf"|のみ|だけ|と(?=[なし考思判い])|{_JOINT}|{_HEDGE.pattern}|{_DENIED.pattern}"
)
_NOT_BEFORE = re.compile(r"(?:\bor|または|又は|もしくは|あるいは|[a-z]か)[ ]*$|[~〜-]$")

_REVISED = re.compile(
    r"訂正|修正|やはり|いや|考え直|見直|再考|再検討|改めて|最終|間違|失礼|誤りでした|"
    r"correction|wait|actually|final|second thought|instead"
)
_TURN = re.compile(
    r"^[\s#>-]*(?:(?:次の|新しい|追加の)?(?:問題|設問|例題)\s*\d*\s*[:.]|次の問題|問\s*\d+|問\s*[:.]"
    r"|question\s*\d*\s*[:.]|q\s*\d*\s*[:.]|\d{2,3}[a-f]\d{1,2}\b|医師国家試験を解きます"
    r"|(?:user|human|assistant|ユーザー?|アシスタント)\s*:)"
    r"|必ず[a-z](?:,[a-z])+の中から|<\|[a-z_]+\|>|</?s>",
    re.MULTILINE,
)
_SPEAKER = re.compile(r"[\s#>-]*(?:assistant|アシスタント)\s*:|<\|im_start\|>")
_INSTRUCTION = re.compile(r"必ず[a-z](?:,[a-z])+の中から.*?選んでください。?")
_ITEM_LINE = re.compile(r"^\s*([a-z])\s*[:.)、]", re.MULTILINE)
_REMARK = re.compile(r"[ ]*\((?![^\n]*(?<![a-z])[a-h](?![a-z0-9]))[^\n]*\)")
_TAIL = re.compile(
    r"(?:[\s。、.,!)\]}」』】\"'>|*]|が正解|が(?:最も)?正しい|を?選[びぶ]|を?選択|が答え"
    r"|と考え(?:られ)?る?|です|である|だ|となる|になる|します|する|なります|ます)*"
)


def extract(question: Question, text: str) -> Extraction:
    """The answer that `text`, a response to `question`, gives; never a letter it does not have."""
    part, run_on = _own_part(_normalise(text), question)
    claims = _find_claims(part, question)
    claim, found = _decide(part, claims)
    if claim is None:
        return Extraction((), found, run_on, run_on)
    went_on = run_on or not _TAIL.fullmatch(part, claim.end)
    return Extraction(claim.answer, claim.kind, went_on, run_on)


def question_slots(question: Question) -> Slots:
    """The slots of a numeric question's answer; empty where its text has none."""
    return find_slots(_normalise(question.text))


def _normalise(text: str) -> str:
    """One spelling: half-width, lower case, no markup; the marks of answer slots survive."""
    text = re.sub(SLOTS, lambda slot: f"⟨{unicodedata.digit(slot[0])}⟩", text)
    text = unicodedata.normalize("NFKC", text).lower().replace("\r\n", "\n").replace("\r", "\n")
    text = re.sub(r"\\(?:text|mathrm|mathbf|textbf)\{([^{}]*)\}", r"\1", text)
    return re.sub(r"\*+|`+|\$|\\[()\[\]]|__", "", text)


def _own_part(text: str, question: Question) -> tuple[str, bool]:
    """The text up to the next question or turn, and whether there is one."""
    start = 0
    for turn in _TURN.finditer(text):
        if text[start : turn.start()].strip():
            return text[start : turn.start()], True
        if turn.start() < start or _SPEAKER.match(text, turn.start()):
            continue
        asked = "".join(_normalise(question.text).split())[:20]
        if asked not in "".join(text[turn.end() :].split())[: len(asked) + 10]:
            return "", True
        # The question itself is repeated first, which is no other question.
        instruction = _INSTRUCTION.search(text, turn.end())
        start = instruction.end() if instruction else turn.end()
    return text[start:], False


def _decide(text: str, claims: list[_Claim]) -> tuple[_Claim | None, str]:
    """The statement that counts: labels before others, a revision before what it revises."""
    labels = [claim for claim in claims if claim.kind == "label"]
    chosen = labels or claims
    if not chosen:
        return None, "nothing"
    later = [claim for claim in claims if claim.start >= chosen[-1].end]
    for claim in later:  # a phrase that takes a label back
        if _REVISED.search(text, chosen[-1].end, claim.end):
            chosen = [*chosen, claim]
    last = chosen[-1]
    same = [claim for claim in chosen if claim.answer == last.answer]
    if len(same) < len(chosen):
        others = [claim for claim in chosen if claim.answer != last.answer]
        since = max(claim.end for claim in others)
        first = min(claim.start for claim in same if claim.start >= others[-1].start)
        # A label's own words ("final answer") lie before the place where its letters begin.
        if not _REVISED.search(text, since, max(first, since)):
            return None, "conflict"
        same = [claim for claim in same if claim.start >= since] or [last]
    return (same[0], "") if last.answer else (None, last.problem)


def _find_claims(text: str, question: Question) -> list[_Claim]:
    claims = [*_stated(text, question), *_alone(text, question)]
    unique: dict[tuple[int, tuple[str, ...]], _Claim] = {}
    for claim in sorted(claims, key=lambda claim: (claim.end, claim.kind != "label")):
        unique.setdefault((claim.end, claim.answer), claim)
    return sorted(unique.values(), key=lambda claim: claim.start)


def _stated(text: str, question: Question) -> Iterator[_Claim]:
    """Statements by label and by phrase."""
    read = functools.partial(_read, text, question=question)
    for label in _LABEL.finditer(text):
        if claim := read(label.end(), "label"):
            yield claim
    positive, chosen = _phrases(question)
    for match in positive.finditer(text):
        if claim := read(match.end(), "phrase"):
            yield claim
    for match in _SO.finditer(text):
        claim = read(match.end(), "phrase")
        if claim and _SO_END.match(text, claim.end):
            yield claim
    if question.is_numeric:
        return
    end = 0
    for letters in _LETTERS.finditer(text):
        if letters.start() < end or _NOT_BEFORE.search(text, 0, letters.start()):
            continue
        claim = read(letters.start(), "phrase")
        if claim and chosen.match(text, claim.end):
            end = claim.end
            yield claim


def _alone(text: str, question: Question) -> Iterator[_Claim]:
    """Answers that are the whole text, its first line or its last."""
    lines = [
        (match.start(), match.end()) for match in re.finditer(r"[^\n]+", text) if match[0].strip()
    ]
    if not lines:
        return
    claims = []
    for start, end in lines:
        claim = _read(text, start, "alone", question)
        if claim:
            remark = _REMARK.match(text, claim.end, end)
            whole = _TAIL.fullmatch(text, remark.end() if remark else claim.end, end)
        claims.append(claim if claim and whole else None)
    if all(claims) and len(claims) > 1:  # a list, one choice a line
        answers = sorted({letter for claim in claims if claim for letter in claim.answer})
        if len(answers) == len(claims) < len(question.letters):
            yield _Claim(lines[0][0], lines[-1][1], tuple(answers), "alone")
            return
    # Where the choices are gone through line by line, one of these lines is not the answer.
    listed = len(set(_ITEM_LINE.findall(text))) > 1
    for claim in dict.fromkeys([claims[0], claims[-1]]):
        if claim and not (listed and _ITEM_LINE.match(text, claim.start)):
            yield claim


def _read(text: str, start: int, kind: str, question: Question) -> _Claim | None:
    """The answer that stands at `start`, if there is one."""
    if question.is_numeric:
        number = read_number(text, start, question_slots(question))
        if number is None:
            return None
        end, value = number
        return _Claim(start, end, (value,) if value else (), kind, "" if value else "conflict")
    read = _read_letters(text, start, question)
    if read is None:
        return None
    end, letters, fits = read
    if instead := _INSTEAD.match(text, end):
        return _read(text, instead.end(), kind, question)
    if _DENIED.match(text, end):
        return None
    if _HEDGE.match(text, end) or not fits:
        return _Claim(start, end, (), kind, "conflict")
    if letters - set(question.letters):
        return _Claim(start, end, (), kind, "unknown")
    return _Claim(start, end, tuple(sorted(letters)), kind)


def _read_letters(text: str, start: int, question: Question) -> tuple[int, set[str], bool] | None:
    """Where a list of letters or choice texts ends, its letters, and whether the two agree."""
    choices, by_text = _choice_pattern(question)
    letters: set[str] = set()
    fits, position, end = True, start, -1
    while True:
        while opened := _OPEN.match(text, position):
            position = opened.end()
        choice, run = choices.match(text, position), _LETTERS.match(text, position)
        if choice and _END.match(text, choice.end()):
            letters |= by_text["".join(choice[0].split())]
            position = choice.end()
        elif run and _is_letters(run[0], question):
            position = run.end()
            told = _TOLD.match(text, position)
            spelt = choices.match(text, told.end()) if told and len(run[0]) == 1 else None
            if spelt and _END.match(text, spelt.end()):
                fits &= run[0] in by_text["".join(spelt[0].split())]
                position = spelt.end()
            letters |= set(run[0])
        else:
            break
        closed = _CLOSED.match(text, position)
        end = position = closed.end() if closed else position
        separator = _SEPARATOR.match(text, position)
        if not separator or not _END.match(text, end):
            break
        position = separator.end()
    return (end, letters, fits) if letters and _END.match(text, end) else None


def _is_letters(run: str, question: Question) -> bool:
    """Whether Latin letters in a row name choices: one does (if only an unknown one), or "ace"."""
    ascending = "".join(sorted(set(run))) == run
    return len(run) == 1 or (ascending and set(run) <= set(question.letters))


@functools.lru_cache(maxsize=4096)
def _phrases(question: Question) -> tuple[re.Pattern[str], re.Pattern[str]]:
    """What stands before, and what behind, the answer of a sentence.

    The question's own words count: where it asks ``誤っているのはどれか``, so does
    ``誤っているのはb``, and ``正しいのはa`` does not.
    """
    text = _normalise(question.text)
    found = re.findall(
        rf"((?:{_NOUN}が)?)(?:最も)?({_NOUN}[ぁ-ん]*)の(?:選択肢)?は(?:どれ|何|次)", text
    )
    asked = [re.escape(found[-1][0]) + "(?:最も)?" + re.escape(found[-1][1])] if found else []
    likely = [] if _NEGATIVE.search(text.rstrip("。").rpartition("。")[2]) else [_LIKELY]
    before = [f"(?:{what})(?:と考えられる)?の?(?:選択肢|もの)?は" for what in asked + likely]
    behind = ["最も適切", "正解", "正答", "答え", *asked, *likely, *_stems(likely)]
    return (
        re.compile("|".join([_SAYS, *(rf"{what}\s*[、,:]?\s*" for what in before)])),
        re.compile(rf"\s*(?:を(?:選[ばびぶべ択]|正解と|解答と|答えと)|が(?:{'|'.join(behind)}))"),
    )


def _stems(likely: list[str]) -> list[str]:
    return ["(?:最|もっと)も考えられ", "(?:最|もっと)も疑われ"] if likely else []


@functools.lru_cache(maxsize=4096)
def _choice_pattern(question: Question) -> tuple[re.Pattern[str], dict[str, set[str]]]:
    """A pattern of the choices' texts, and the letters of each text (spaces apart)."""
    by_text: dict[str, set[str]] = {}
    patterns = []
    for letter, choice in zip(question.letters, question.choices, strict=True):
        words = _normalise(choice).strip(" 。").split()
        if not words or re.fullmatch("[a-z]", "".join(words)):
            continue  # not to be told from a letter
        by_text.setdefault("".join(words), set()).add(letter)
        patterns.append(r"\s*".join(re.escape(c) for c in "".join(words)))
    if not patterns:
        return re.compile(r"(?!)"), {}
    return re.compile("|".join(sorted(patterns, key=len, reverse=True))), {
        # Two choices that read alike cannot be told apart by their text.
        text: letters if len(letters) == 1 else {"?"}
        for text, letters in by_text.items()
    }
