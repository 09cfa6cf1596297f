"""Tables of a run's scalars: each says what it is."""

import jax
import pytest

from rpo_jax.config import MODES
from rpo_jax.examine import LOGGED_RATES
from rpo_jax.training.measures import explain_measure, format_measures
from rpo_jax.training.results import MEASURES
from rpo_jax.training.state import abstract_weights
from tests.tiny import NETWORK, make_config, make_work, pair_batch, pairs, text_batch


@pytest.mark.parametrize("preference", ["", "dpo", "ipo", "simpo", "orpo", "none"])
def test_whatever_a_stage_measures_is_explained(preference):
    stage, changes = ("rpo", {"rpo": {"preference": preference}}) if preference else ("cpt", {})
    work = make_work(make_config(stage, **changes))
    batch = pair_batch(pairs()) if preference else text_batch()
    weights = abstract_weights(NETWORK, work.mesh)
    with jax.set_mesh(work.mesh):
        sums = jax.eval_shape(work.objective.sums, weights, batch, work.hyper)
    names = {name for group in sums.values() for name in group}
    assert "nll" in names and preference in {*names, "", "none"}
    assert all(map(explain_measure, names))


def test_whatever_an_exam_or_a_sweep_shows_is_explained():
    rates = [f"exam/{mode}/{name}" for mode in MODES for name in ("share", *LOGGED_RATES)]
    assert all(map(explain_measure, [*rates, *MEASURES, "general_nll"]))
    assert explain_measure("of_tomorrow") == ""


def test_a_table_has_a_row_a_measure():
    table = format_measures("held out", {"before": {}, "after": {"nll": 2.0, "new": 1.0}})
    assert table == [
        "held out                         before      after",
        "nll                                   -     2.0000  nats/token (of pairs: of the tokens "
        "that rpo.nll_tokens names)",
        "new                                   -     1.0000",
    ]
