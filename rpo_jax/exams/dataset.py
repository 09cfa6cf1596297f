"""Exams as a tensorflow-datasets builder, for those who keep their data that way.

    builder = ExamDataset(config="igakuqa", data_dir="...")
    builder.download_and_prepare(
        download_config=tfds.download.DownloadConfig(manual_dir="the folder with 2018 to 2022")
    )
    builder.as_data_source("year_2022")

No TensorFlow is needed. Nothing is downloaded: an exam is fetched by hand.
"""

from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import tensorflow_datasets as tfds

from rpo_jax.exams.exam import Exam, find_exam, list_exams
from rpo_jax.exams.igakuqa import Question

DEMONSTRATIONS = "demonstrations"
_VERSION = "1.0.0"


class ExamDataset(tfds.core.GeneratorBasedBuilder):
    """Every exam that is known, a config each; a split a year, and one of the demonstrations."""

    VERSION = tfds.core.Version(_VERSION)
    BUILDER_CONFIGS = [  # noqa: RUF012 (tensorflow-datasets wants a list)
        tfds.core.BuilderConfig(name=name, version=_VERSION) for name in list_exams()
    ]
    MANUAL_DOWNLOAD_INSTRUCTIONS = (
        "manual_dir is the folder that holds a folder for each year; IgakuQA's is `data` of "
        "github.com/jungokasai/IgakuQA"
    )
    url_infos: Mapping[str, Any] = {}  # nothing is downloaded; looking for checksums would fail

    def __init__(self, config: str = "igakuqa", data_dir: str | Path | None = None) -> None:
        """A builder of the exam `config`, which writes ArrayRecord below `data_dir`."""
        self._exam: Exam = find_exam(config)
        super().__init__(config=config, data_dir=data_dir, file_format="array_record")

    def _info(self) -> tfds.core.DatasetInfo:
        text = tfds.features.Text()
        features = {
            **dict.fromkeys(("id", "text", "section", "category", "explanation"), text),
            **dict.fromkeys(("choices", "answers", "kinki"), tfds.features.Sequence(text)),
            "points": tfds.features.Scalar(np.int32),
            "year": tfds.features.Scalar(np.int32),
            "text_only": tfds.features.Scalar(np.bool_),
        }
        return tfds.core.DatasetInfo(
            builder=self,
            description=self._exam.title,
            homepage=self._exam.source,
            features=tfds.features.FeaturesDict(features),
            disable_shuffling=True,
        )

    def _split_generators(self, dl_manager: Any) -> dict[str, Iterator[tuple[int, dict]]]:
        folder = Path(dl_manager.manual_dir)
        questions = self._exam.read(folder, None)
        years = sorted({question.year or 0 for question in questions})
        splits = {
            f"year_{year}": self._generate_examples(q for q in questions if q.year == year)
            for year in years
        }
        shown = self._exam.demonstrate(folder)
        return {**splits, DEMONSTRATIONS: self._generate_examples(shown)}

    def _generate_examples(self, questions: Iterable[Question]) -> Iterator[tuple[int, dict]]:
        for place, question in enumerate(questions):
            example = {name: getattr(question, name) for name in self.info.features}
            yield (
                place,
                {**example, "year": question.year or 0, "explanation": question.explanation or ""},
            )
