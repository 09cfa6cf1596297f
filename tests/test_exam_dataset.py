"""The exam as a dataset: the same questions in the same order, from a manual directory."""

import pytest
import tensorflow_datasets as tfds

from rpo_jax.errors import UserError
from rpo_jax.exams.dataset import DEMONSTRATIONS, ExamDataset
from rpo_jax.exams.igakuqa import Question, read_demonstrations
from tests.sittings import YEAR, make_exam


def build(folder, config: str, manual_dir) -> ExamDataset:
    builder = ExamDataset(config=config, data_dir=folder)
    downloads = tfds.download.DownloadConfig(manual_dir=manual_dir)
    builder.download_and_prepare(download_config=downloads)
    return builder


def to_question(example: dict) -> Question:
    def read(value):
        return value.decode() if isinstance(value, bytes) else value

    fields = {name: read(value) for name, value in example.items()}
    for name in ("choices", "answers", "kinki"):
        fields[name] = tuple(map(read, fields[name]))
    fields |= {
        "points": int(fields["points"]),
        "year": int(fields["year"]) or None,
        "text_only": bool(fields["text_only"]),
        "explanation": fields["explanation"] or None,
    }
    return Question(**fields)


def test_it_holds_what_the_reader_reads(tmp_path):
    directory, questions = make_exam(tmp_path)
    builder = build(tmp_path / "tfds", "fictional", directory)
    assert list(map(to_question, builder.as_data_source(f"year_{YEAR}"))) == questions
    shown = list(map(to_question, builder.as_data_source(DEMONSTRATIONS)))
    assert shown == read_demonstrations(directory)


def test_the_real_exam_has_its_years(tmp_path, igakuqa_dir):
    builder = build(tmp_path, "igakuqa", igakuqa_dir)
    assert {name: split.num_examples for name, split in builder.info.splits.items()} == {
        **{f"year_{year}": 400 for year in range(2018, 2023)},
        DEMONSTRATIONS: 3,
    }


def test_a_missing_directory_or_exam_is_named(tmp_path):
    with pytest.raises(AssertionError, match="IgakuQA"):
        build(tmp_path, "igakuqa", tmp_path / "nowhere")
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "notes.txt").touch()
    with pytest.raises(UserError, match="no folder for"):
        build(tmp_path, "igakuqa", tmp_path / "other")
    with pytest.raises(UserError, match="known: fictional, igakuqa"):
        ExamDataset(config="bar", data_dir=tmp_path)
