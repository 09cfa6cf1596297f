"""A closed, invented medicine: facts, texts, an exam and preference pairs, numbered by seed.

Nothing in it is true. It exists so that a whole study fits on a laptop and the truth is known.
"""

from rpo_jax.exams.fictional.files import write_world
from rpo_jax.exams.fictional.world import (
    SIZES,
    SPLIT_YEARS,
    TEST_SEEDS_FROM,
    VERSION,
    Item,
    Pair,
    Size,
    World,
    is_test_world,
    make_world,
)

__all__ = [
    "SIZES",
    "SPLIT_YEARS",
    "TEST_SEEDS_FROM",
    "VERSION",
    "Item",
    "Pair",
    "Size",
    "World",
    "is_test_world",
    "make_world",
    "write_world",
]
