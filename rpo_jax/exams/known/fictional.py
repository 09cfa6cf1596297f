"""The embedded world's exam: an invented medicine, made on the spot, its truth known."""

from rpo_jax.exams.exam import Exam
from rpo_jax.exams.fictional import SPLIT_YEARS

EXAM = Exam(
    name="fictional",
    title="The fictional world's exam",
    source="the world that a run with data.source=fictional writes (its folder exam)",
    years=(SPLIT_YEARS["test"],),
    dev_years=(SPLIT_YEARS["dev"],),
    required_sections="BE",
    shots=0,
    names=True,
    prohibited_from=4,
)
