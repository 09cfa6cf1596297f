"""IgakuQA: Japan's medical licensing exam, 2018 to 2022 (the 112th to the 116th).

Source: arXiv:2303.18027 for questions, points and the rule; the ministry's announcements for the
pass marks; arXiv:2504.18080 for the points of the two 72B models, arXiv:2303.18027 for GPT-4's.
"""

from rpo_jax.exams.exam import Exam

_YEARS = (2018, 2019, 2020, 2021, 2022)


def _by_year(*points: int) -> dict[int, int]:
    return dict(zip(_YEARS, points, strict=True))


EXAM = Exam(
    name="igakuqa",
    title="IgakuQA",
    source="github.com/jungokasai/IgakuQA (its folder data)",
    years=_YEARS,
    dev_years=_YEARS[:-1],
    directory_variable="IGAKUQA_DIR",
    always_right=frozenset({"116A71"}),
    required_sections="BE",
    general_pass=_by_year(208, 209, 217, 209, 214),
    prohibited_from=4,
    published={
        "Preferred-MedLLM-Qwen-72B": _by_year(434, 420, 439, 430, 433),
        "Qwen2.5-72B": _by_year(412, 394, 394, 393, 399),
        "GPT-4": _by_year(382, 385, 387, 398, 392),
    },
)
