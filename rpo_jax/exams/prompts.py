"""Named, versioned exam prompts.

A format never changes once results carry its name: a new wording is a new name. The official
wording and layout are facts of the published evaluation (github jungokasai/IgakuQA): chat models
get a system line and alternating turns; completion models get the same turns joined by newlines,
without the system line, the answer on a line of its own. The explain-first wording is ours, with
the cues seen in the outputs of the released model (``考察:`` then ``答え: c``).
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from rpo_jax.exams.igakuqa import Question


@dataclass(frozen=True)
class PromptFormat:
    """How a question becomes a prompt, and an answer a response.

    As text, ``render(...) + target(...)`` reads exactly like one more demonstration.

    Attributes:
        name: Stored with every result.
        system: The system message, or as text the first line; "" for none.
        cue: What the question ends with, so that the response is the next thing to write.
        shots: Demonstrations needed; other numbers are refused, since the name must say it all.
        explains: Whether an explanation comes before the answer.
        names: Whether an answer is the text of a choice instead of its letter.
    """

    name: str
    system: str
    cue: str
    shots: int
    explains: bool
    names: bool = False

    def render(self, question: Question, demonstrations: Sequence[Question] = ()) -> str:
        """The prompt as one text, for models without a chat template; ends without a newline.

        Raises:
            ValueError: The number of demonstrations is not `shots`, or one lacks an explanation.
        """
        self._check(demonstrations)
        lines = [self.system] if self.system else []
        lines += [self._ask(d) + self._answer_as_gold(d) for d in demonstrations]
        return "\n".join([*lines, self._ask(question)])

    def render_worked(self, question: Question, demonstrations: Sequence[Question] = ()) -> str:
        """The prompt and its right answer, as one text to learn from.

        Raises:
            ValueError: As `render` and `target`.
        """
        return self.render(question, demonstrations) + self._answer_as_gold(question)

    def messages(
        self, question: Question, demonstrations: Sequence[Question] = ()
    ) -> list[dict[str, str]]:
        """The same prompt as chat messages (role, content); the last one is the user's.

        Raises:
            ValueError: As `render`.
        """
        self._check(demonstrations)
        messages = [{"role": "system", "content": self.system}] if self.system else []
        for demonstration in demonstrations:
            messages.append({"role": "user", "content": self._ask(demonstration)})
            gold, explanation = demonstration.accepted[0], demonstration.explanation
            reply = self.reply(demonstration, gold, explanation)
            messages.append({"role": "assistant", "content": reply})
        return [*messages, {"role": "user", "content": self._ask(question)}]

    def target(
        self, question: Question, letters: Sequence[str], explanation: str | None = None
    ) -> str:
        """The response that gives `letters` (for a numeric question: the one number).

        Answer-only responses start with a newline, as the published completion layout does.

        Raises:
            ValueError: No letters, letters that the question does not have, or an explanation
                that is missing where the format explains.
        """
        unknown = [] if question.is_numeric else [x for x in letters if x not in question.letters]
        if not letters or unknown:
            raise ValueError(
                f"question {question.id}: answer {list(letters)} is not made of the letters "
                f"{list(question.letters)}"
            )
        answer = ",".join(letters)
        if self.names and question.choices:
            texts = dict(zip(question.letters, question.choices, strict=True))
            answer = "、".join(texts[letter] for letter in letters)
        if not self.explains:
            return "\n" + answer
        if not explanation:
            raise ValueError(f"question {question.id}: prompt {self.name} needs an explanation")
        return f"{explanation}\n答え: {answer}"

    def reply(
        self, question: Question, letters: Sequence[str], explanation: str | None = None
    ) -> str:
        """`target` as a chat message of its own."""
        return self.target(question, letters, explanation).removeprefix("\n")

    def _ask(self, question: Question) -> str:
        lines = [f"問題: {question.text}"]
        pairs = zip(question.letters, question.choices, strict=True)
        lines += [f"{letter}: {choice}" for letter, choice in pairs]
        if question.choices:
            # "a,b,c,d,e" is fixed in the published prompt, also for six or eight choices.
            count = len(question.answers)
            lines.append(f"必ずa,b,c,d,eの中からちょうど{count}個選んでください。")
        if question.choices or self.explains:
            lines.append(self.cue)  # the published prompt has no cue after a numeric question
        return "\n".join(lines)

    def _answer_as_gold(self, question: Question) -> str:
        return self.target(question, question.accepted[0], question.explanation)

    def _check(self, demonstrations: Sequence[Question]) -> None:
        if len(demonstrations) != self.shots:
            raise ValueError(
                f"prompt {self.name} takes {self.shots} demonstrations, got {len(demonstrations)}"
            )


_EXAM = "医師国家試験を解きます。"
_NAME = _EXAM + "選択肢の記号ではなく、語句で答えてください。"
_EXPLAIN = _EXAM + "選択肢を一つずつ順に検討し、考察を書いてから答えてください。"

OFFICIAL_V1 = PromptFormat("OFFICIAL_V1", _EXAM, "答え:", shots=3, explains=False)
OFFICIAL_COMPLETION_V1 = PromptFormat(
    "OFFICIAL_COMPLETION_V1", "", "答え:", shots=3, explains=False
)
EXPLAIN_V1 = PromptFormat("EXPLAIN_V1", _EXPLAIN, "考察:", shots=3, explains=True)
ANSWER_ZERO_SHOT_V1 = PromptFormat("ANSWER_ZERO_SHOT_V1", _EXAM, "答え:", shots=0, explains=False)
NAME_ZERO_SHOT_V1 = PromptFormat(
    "NAME_ZERO_SHOT_V1", _NAME, "答え:", shots=0, explains=False, names=True
)
EXPLAIN_ZERO_SHOT_V1 = PromptFormat(
    "EXPLAIN_ZERO_SHOT_V1", _EXPLAIN, "考察:", shots=0, explains=True
)

FORMATS: Mapping[str, PromptFormat] = {
    f.name: f
    for f in (
        OFFICIAL_V1,
        OFFICIAL_COMPLETION_V1,
        EXPLAIN_V1,
        ANSWER_ZERO_SHOT_V1,
        NAME_ZERO_SHOT_V1,
        EXPLAIN_ZERO_SHOT_V1,
    )
}
