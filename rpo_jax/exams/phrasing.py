"""How questions are put to one model: as plain text, or by its chat template."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from rpo_jax.data.chat import Chat, read_chat
from rpo_jax.data.tokenizer import Tokenizer
from rpo_jax.errors import UserError
from rpo_jax.exams.igakuqa import Question
from rpo_jax.exams.prompts import PromptFormat

CHAT_CHOICES = ("auto", "yes", "no")


@dataclass(frozen=True)
class Phrasing:
    """Prompts and answers as the tokens of one model.

    Attributes:
        tokenizer: of the model.
        chat: its template; None: prompts are plain text that the model goes on with.
    """

    tokenizer: Tokenizer
    chat: Chat | None = None

    def render(
        self, style: PromptFormat, question: Question, demonstrations: Sequence[Question]
    ) -> str:
        """A prompt as text; with a chat template, its control tokens are spelt in it."""
        if self.chat is None:
            return style.render(question, demonstrations)
        return self.chat.render(style.messages(question, demonstrations), self.tokenizer)

    def encode(self, prompt: str) -> list[int]:
        """The tokens of a prompt."""
        if self.chat is None:
            return self.tokenizer.encode(prompt)
        return self.tokenizer.encode_marked(prompt)

    def encode_answer(
        self, style: PromptFormat, question: Question, letters: Sequence[str]
    ) -> list[int]:
        """The tokens of an answer behind a prompt."""
        give = style.target if self.chat is None else style.reply
        return self.tokenizer.encode(give(question, letters))


def find_phrasing(folder: Path, tokenizer: Tokenizer, chat: str) -> Phrasing:
    """How the model of a folder is asked.

    Args:
        folder: holds the tokenizer's files.
        tokenizer: of the model.
        chat: "yes", "no", or "auto": by the template if the model's end of text ends its turns.
            That of a base model, which never saw its template, does not.

    Raises:
        UserError: a template is wanted and there is none.
    """
    found = read_chat(folder) if chat != "no" else None
    if chat == "yes" and found is None:
        raise UserError(f"--chat=yes: {folder} has no chat template; --chat=no asks in plain text")
    if chat == "auto" and found is not None and not found.ends_with(tokenizer.eos_token):
        found = None
    return Phrasing(tokenizer, found)
