"""What a run wants to find before it starts, looked for without making anything."""

from collections.abc import Callable, Iterator
from functools import partial

from rpo_jax.config import Config
from rpo_jax.data import corpus, pairs
from rpo_jax.data.files import find_files
from rpo_jax.errors import UserError
from rpo_jax.exams.exam import find_exam
from rpo_jax.exams.igakuqa import read_demonstrations
from rpo_jax.exams.sources import find_exam_folder, read_kept_out
from rpo_jax.prepare import load_tokenizer
from rpo_jax.training.checkpoint import has_checkpoint
from rpo_jax.training.run import find_shape

_MADE = "made on the spot"


def list_inputs(config: Config) -> dict[str, str | UserError]:
    """What a run reads, by field: what was found, or what its start would complain of."""
    found: dict[str, str | UserError] = {}
    for name, look in _list_looks(config):
        try:
            found[name] = look()
        except UserError as error:
            found[name] = error
    return found


def format_inputs(found: dict[str, str | UserError]) -> str:
    """The inputs as a table for the terminal."""
    width = max(map(len, found))
    return "\n".join(
        f"{'MISSING' if isinstance(what, UserError) else 'there':<7}  {name:<{width}}  {what}"
        for name, what in found.items()
    )


def _list_looks(config: Config) -> Iterator[tuple[str, Callable[[], str]]]:
    data = config.data
    if config.origin is not None:
        yield "init_from", lambda: _find_origin(config)
    if config.tokenizer.path or config.origin is None:
        yield "tokenizer", lambda: _find_tokenizer(config)
    if data.source == "files":
        for split in ("train", "heldout"):
            yield from _look_for_files(config, f"data.{split}", getattr(data, split))
    elif data.source == "candidates":
        yield "data.sample.exam", lambda: _find_exam(config, data.sample.exam)
        yield from _look_for_files(config, "data.sample.files", data.sample.files)
        yield from _look_for_files(config, "data.pair.explanations", data.pair.explanations)
    else:
        yield "data.source", lambda: _find_exam(config, data.source)
    if config.stage == "cpt":
        yield from _look_for_files(config, "data.general", data.general)
        for name in data.corpus.exams if data.corpus.decontaminate else ():
            if name.endswith(".jsonl"):
                yield from _look_for_files(config, "data.corpus.exams", (name,))
            else:
                yield f"data.corpus.exams {name}", partial(_find_kept_out, config, name)
    if config.exam.name:
        yield "exam.name", lambda: _ask_for(config.exam.name, config.exam.directory)


def _find_origin(config: Config) -> str:
    find_shape(config)
    assert config.origin is not None, "asked for where there is one"
    if not has_checkpoint(config.origin):
        raise UserError(f"init_from={config.init_from}: {config.origin} has no checkpoint yet")
    return str(config.origin) if config.tokenizer.path else _find_tokenizer(config)


def _find_tokenizer(config: Config) -> str:
    if not config.tokenizer.path and config.origin is None:
        return f"trained on the text, {config.tokenizer.train_vocab_size:,} ids"
    tokenizer = load_tokenizer(config)
    return f"{config.tokenizer.path or config.origin}: {tokenizer.vocab_size:,} ids"


def _look_for_files(
    config: Config, field: str, patterns: tuple[str, ...]
) -> Iterator[tuple[str, Callable[[], str]]]:
    """A look for each pattern."""
    suffixes = corpus.SUFFIXES if config.stage == "cpt" else pairs.SUFFIXES
    for pattern in patterns:

        def look(pattern: str = pattern) -> str:
            return f"{len(find_files([pattern], suffixes, field)):,} files"

        yield f"{field} {pattern}", look


def _find_exam(config: Config, name: str) -> str:
    """The years that a run trains on and holds out."""
    if name == "fictional":
        return f"fictional, world {config.data.fictional.seed}: {_MADE}"
    exam, asked = find_exam(name), config.data.igakuqa
    folder = find_exam_folder(config)
    questions = exam.read(folder, (*asked.train_years, *asked.heldout_years))
    read_demonstrations(folder)
    return f"{folder}: {len(questions):,} questions"


def _find_kept_out(config: Config, name: str) -> str:
    """The exam whose questions the training text must not hold."""
    folder, questions = read_kept_out(config, name)
    return f"{folder}: {len(questions):,} questions to keep out"


def _ask_for(name: str, directory: str = "") -> str:
    """The folder of an exam that the run is measured by."""
    if name == "fictional" and not directory:
        return f"fictional: {_MADE}"
    exam = find_exam(name)
    folder = exam.find(directory)
    return f"{folder}: {len(exam.read(folder, exam.years or None)):,} questions"
