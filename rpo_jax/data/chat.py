"""Chat templates: how a checkpoint wants its conversations written down."""

import datetime
import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NoReturn

import jinja2
import jinja2.sandbox

from rpo_jax.data.tokenizer import SETTINGS_FILE, Tokenizer
from rpo_jax.errors import UserError

_TEMPLATE_FILE = "chat_template.jinja"
_SPECIAL = ("bos_token", "eos_token", "pad_token", "unk_token")  # that a template may name


@dataclass(frozen=True)
class Chat:
    """The chat template of a model folder.

    Attributes:
        path: where it was found.
        source: Jinja.
        special: tokens that it may name, as they are spelt.
    """

    path: Path
    source: str = field(repr=False)
    special: Mapping[str, str] = field(repr=False)

    @property
    def fingerprint(self) -> str:
        """A digest of the template."""
        return hashlib.sha256(self.source.encode()).hexdigest()[:16]

    def ends_with(self, token: str) -> bool:
        """Whether turns end with a token, as those of a model do that was trained to chat."""
        return token in self.source or ("eos_token" in self.source and bool(token))

    def render(self, messages: Sequence[Mapping[str, str]], tokenizer: Tokenizer) -> str:
        """The text of a conversation, up to where the next reply begins.

        It is for `tokenizer.encode_marked`; what could be taken for a control token there stands
        in no message.

        Raises:
            UserError: a message spells a control token, or the template refuses the messages.
        """
        for message in messages:
            found = [token for token in tokenizer.control.values() if token in message["content"]]
            if found:
                raise UserError(f"{self.path}: a message spells the control token {found[0]!r}")
        # As transformers sets it up; a template is a program of whoever made the checkpoint.
        environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
            trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"]
        )
        environment.filters["tojson"] = _to_json
        environment.globals |= {"raise_exception": _refuse, "strftime_now": _tell_time}
        try:
            return environment.from_string(self.source).render(
                messages=list(messages), add_generation_prompt=True, **self.special
            )
        except (jinja2.TemplateError, TypeError) as error:
            raise UserError(f"{self.path}: the chat template fails ({error})") from error


def read_chat(folder: Path) -> Chat | None:
    """The chat template beside a tokenizer; None where there is none.

    Raises:
        UserError: the files are damaged.
    """
    path = folder / SETTINGS_FILE
    try:
        settings = json.loads(path.read_text("utf-8")) if path.is_file() else {}
        source = settings.get("chat_template") or ""
        if isinstance(source, list):
            source = {item["name"]: item["template"] for item in source}.get("default", "")
        special = {name: _spell(settings[name]) for name in _SPECIAL if settings.get(name)}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{path}: damaged ({error!r})") from error
    if (folder / _TEMPLATE_FILE).is_file():
        path = folder / _TEMPLATE_FILE
        source = path.read_text("utf-8")
    return Chat(path, source, special) if source else None


def _spell(token: Any) -> str:
    return str(token["content"] if isinstance(token, dict) else token)


def _to_json(value: Any, indent: int | None = None) -> str:
    return json.dumps(value, ensure_ascii=False, indent=indent)


def _refuse(message: str) -> NoReturn:
    raise jinja2.TemplateError(message)


def _tell_time(pattern: str) -> str:
    return datetime.datetime.now().strftime(pattern)
