"""Text to token ids and back: Hugging Face's tokenizer.json and SentencePiece models alike."""

import difflib
import hashlib
import io
import itertools
import json
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import sentencepiece
import tokenizers

from rpo_jax.errors import UserError
from rpo_jax.writing import write_whole

END_OF_TEXT = "<|endoftext|>"
FILE_NAMES = ("tokenizer.json", "tokenizer.model")
SETTINGS_FILE = "tokenizer_config.json"  # where Hugging Face names the end of text too
_SPACE = "\u2581"  # what SentencePiece writes for a space
_LINE_CHARACTERS = 1000  # the trainer silently skips lines above 4192 bytes


@dataclass(frozen=True)
class Tokenizer:
    """A tokenizer and its choice of the token that ends documents and responses.

    Text is always read as plain text: a literal end-of-text token in it becomes ordinary tokens, so
    `eos_id` only ever stands where we put it.

    Attributes:
        vocab_size: the highest id + 1; a model needs at least so many embedding rows.
        eos_id: id of `eos_token`.
        eos_token: as the tokenizer spells it.
        content: the file, byte for byte.
        file_name: under which a saved copy is found again.
        control: tokens that no text is read as, by id, as they are spelt.
    """

    vocab_size: int
    eos_id: int
    eos_token: str
    content: bytes = field(repr=False)
    file_name: str
    control: Mapping[int, str] = field(repr=False)
    _encode: Callable[[Sequence[str]], list[list[int]]] = field(repr=False)
    _decode: Callable[[Sequence[int]], str] = field(repr=False)

    @property
    def fingerprint(self) -> str:
        """sha256 of the file and of the end-of-text choice."""
        return hashlib.sha256(self.content + b"\0" + self.eos_token.encode()).hexdigest()

    def encode(self, text: str) -> list[int]:
        """The ids of `text`; nothing is added at its ends."""
        return self._encode([text])[0]

    def encode_many(self, texts: Sequence[str]) -> list[list[int]]:
        """The ids of each text."""
        return self._encode(texts)

    def encode_marked(self, text: str) -> list[int]:
        """The ids of a text in which control tokens are spelt out and mean themselves."""
        ids_of = {token: id_ for id_, token in self.control.items()}
        spelt = "|".join(re.escape(token) for token in sorted(ids_of, key=len, reverse=True))
        ids: list[int] = []
        for part in re.split(f"({spelt})", text) if spelt else [text]:
            ids += [ids_of[part]] if part in ids_of else self.encode(part)
        return ids

    def decode(self, ids: Sequence[int]) -> str:
        """The text of `ids`, control tokens spelt out where the tokenizer can."""
        return self._decode(ids)

    def __reduce__(self) -> tuple[Any, ...]:
        """Goes to other processes as the content of its file."""
        return _parse, (Path(self.file_name), self.content, self.eos_token)

    def save(self, directory: Path) -> None:
        """Copies the file and the end of text into `directory`, for `read_tokenizer` to find."""
        directory.mkdir(parents=True, exist_ok=True)
        settings = json.dumps({"eos_token": self.eos_token}, ensure_ascii=False) + "\n"
        write_whole(directory / SETTINGS_FILE, settings)
        write_whole(directory / self.file_name, self.content)


def read_tokenizer(path: str | Path, end_of_text: str = "") -> Tokenizer:
    """Reads a tokenizer.json, a SentencePiece model, or a folder that holds one of them.

    Args:
        path: the file or folder.
        end_of_text: the token that ends documents; empty: what the folder's tokenizer_config.json
            says, else <|endoftext|>, else what a SentencePiece model itself calls its end.

    Raises:
        UserError: no such file, not a tokenizer, or no such end-of-text token.
    """
    path = Path(path)
    if path.is_dir():
        end_of_text = end_of_text or _stated_end(path / SETTINGS_FILE)
        found = [path / name for name in FILE_NAMES if (path / name).is_file()]
        if not found:
            raise UserError(f"{path}: holds no tokenizer ({' or '.join(FILE_NAMES)} is wanted)")
        path = found[0]
    if not path.is_file():
        raise UserError(f"{path}: no such tokenizer file")
    return _parse(path, path.read_bytes(), end_of_text)


def _parse(path: Path, content: bytes, end_of_text: str) -> Tokenizer:
    if content.lstrip()[:1] == b"{":
        return _from_json(path, content, end_of_text)
    return _from_sentencepiece(path, content, end_of_text)


def train_sentencepiece(texts: Iterable[str], vocab_size: int, target: Path) -> Tokenizer:
    """Trains a small SentencePiece model on `texts` and writes it to the folder `target`.

    The same texts give the same model. Every text survives the round trip: nothing is normalised,
    spaces and newlines are kept, and what the vocabulary lacks falls back to bytes.

    Raises:
        UserError: the text is too small for the vocabulary, or has too many characters for it.
    """
    counts: Counter[str] = Counter()
    lines: list[str] = []
    for text in texts:
        counts.update(text)
        lines.extend(_cut(text))
    if not lines:
        raise UserError("there is no text to train a tokenizer on")
    model = io.BytesIO()
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(lines),
            model_writer=model,
            vocab_size=vocab_size,
            model_type="bpe",
            normalization_rule_name="identity",
            remove_extra_whitespaces=False,
            add_dummy_prefix=False,
            byte_fallback=True,
            user_defined_symbols=["\n"],
            unk_id=0,
            eos_id=1,
            bos_id=-1,
            pad_id=-1,
            eos_piece=END_OF_TEXT,
            character_coverage=_coverage(counts, (vocab_size - 259) // 2),
            num_threads=1,
            minloglevel=2,
        )
    except RuntimeError as error:
        raise _untrainable(vocab_size, str(error)) from error
    content = model.getvalue()
    tokenizer = _from_sentencepiece(target / FILE_NAMES[1], content, END_OF_TEXT)
    tokenizer.save(target)
    return tokenizer


def _from_json(path: Path, content: bytes, end_of_text: str) -> Tokenizer:
    try:
        library = tokenizers.Tokenizer.from_str(content.decode("utf-8"))
    except Exception as error:  # the library raises bare Exception
        raise UserError(f"{path}: not a tokenizer.json ({error})") from error
    library.encode_special_tokens = True  # that is: as the plain text they are
    library.no_truncation()
    library.no_padding()
    vocabulary = library.get_vocab(with_added_tokens=True)
    eos_token = end_of_text or END_OF_TEXT
    if eos_token not in vocabulary:
        added = [str(token) for token in library.get_added_tokens_decoder().values()]
        raise _no_end(path, eos_token, added)
    eos_id = vocabulary[eos_token]

    def encode(texts: Sequence[str]) -> list[list[int]]:
        return [found.ids for found in library.encode_batch_fast(texts, add_special_tokens=False)]

    if eos_id in encode([eos_token])[0]:
        raise UserError(
            f"{path}: {eos_token!r} is an ordinary token, and text that contains it would end "
            "there; choose a control token (tokenizer.end_of_text)"
        )
    return Tokenizer(
        vocab_size=max(vocabulary.values()) + 1,
        eos_id=eos_id,
        eos_token=eos_token,
        content=content,
        file_name=FILE_NAMES[0],
        control={i: str(token) for i, token in library.get_added_tokens_decoder().items()},
        _encode=encode,
        _decode=lambda ids: library.decode(list(ids), skip_special_tokens=False),
    )


def _from_sentencepiece(path: Path, content: bytes, end_of_text: str) -> Tokenizer:
    try:
        library = sentencepiece.SentencePieceProcessor(model_proto=content)
    except Exception as error:  # RuntimeError, or whatever the binding makes of broken bytes
        raise UserError(f"{path}: neither a tokenizer.json nor a SentencePiece model") from error
    if not library.vocab_size():
        raise UserError(f"{path}: neither a tokenizer.json nor a SentencePiece model")
    pieces = [library.id_to_piece(i) for i in range(library.vocab_size())]
    own = pieces[library.eos_id()] if library.eos_id() >= 0 else ""
    eos_token = end_of_text or (END_OF_TEXT if END_OF_TEXT in pieces else own)
    if eos_token not in pieces:
        control = [piece for i, piece in enumerate(pieces) if library.is_control(i)]
        raise _no_end(path, eos_token or END_OF_TEXT, control)
    eos_id = pieces.index(eos_token)
    if not library.is_control(eos_id):
        raise UserError(
            f"{path}: {eos_token!r} is an ordinary token, and text that contains it would end "
            "there; choose a control token (tokenizer.end_of_text)"
        )
    space_ids = [library.piece_to_id(f"<0x{byte:02X}>") for byte in _SPACE.encode()]

    def encode(texts: Sequence[str]) -> list[list[int]]:
        return list(map(encode_one, texts))

    def encode_one(text: str) -> list[int]:
        # The library reads a literal "\u2581" as a space; as bytes it survives.
        first, *rest = library.encode(text.split(_SPACE))
        return list(itertools.chain(first, *(space_ids + ids for ids in rest)))

    return Tokenizer(
        vocab_size=library.vocab_size(),
        eos_id=eos_id,
        eos_token=eos_token,
        content=content,
        file_name=FILE_NAMES[1],
        control={i: piece for i, piece in enumerate(pieces) if library.is_control(i)},
        _encode=encode,
        _decode=lambda ids: library.decode([int(i) for i in ids]),
    )


def _untrainable(vocab_size: int, reason: str) -> UserError:
    """What the trainer's complaint means for the config."""
    wanted = f"a SentencePiece model of {vocab_size} tokens cannot be trained on this text: "
    if most := re.search(r"value <= (\d+)", reason):
        wanted += f"it is too small; set tokenizer.train_vocab_size to at most {most[1]}"
    elif least := re.search(r"required_chars\. \d+ vs (\d+)", reason):
        wanted += f"its characters alone need tokenizer.train_vocab_size of at least {least[1]}"
    else:
        wanted += reason
    return UserError(wanted)


def _stated_end(settings: Path) -> str:
    if not settings.is_file():
        return ""
    try:
        stated = json.loads(settings.read_text(encoding="utf-8")).get("eos_token") or ""
    except (ValueError, AttributeError) as error:
        raise UserError(f"{settings}: not a JSON object in UTF-8 ({error})") from error
    return stated["content"] if isinstance(stated, dict) else stated


def _no_end(path: Path, wanted: str, known: list[str]) -> UserError:
    close = difflib.get_close_matches(wanted, known, n=3, cutoff=0.4)
    hint = f"close: {', '.join(close)}" if close else f"it has {', '.join(known[:20]) or 'none'}"
    return UserError(
        f"{path}: no token {wanted!r} to end documents with; set tokenizer.end_of_text to one of "
        f"its control tokens ({hint})"
    )


def _cut(text: str) -> Iterator[str]:
    for line in text.splitlines(keepends=True):
        for start in range(0, len(line), _LINE_CHARACTERS):
            yield line[start : start + _LINE_CHARACTERS]


def _coverage(counts: Counter[str], characters: int) -> float:
    """The share of the text that its most frequent `characters` make up; the rest become bytes."""
    covered = sum(count for _, count in counts.most_common(max(characters, 1)))
    return min(max(covered / counts.total(), 0.98), 1.0)  # all that the trainer takes
