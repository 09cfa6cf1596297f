"""Stage 2 on real answers: what other systems answered, judged by the key, paired.

`--config.data.sample.files` names the answers, a line of JSON each: {"id", "text"} or the published
{"problem_id", "prediction"}. Pairs are right answers over wrong ones in the official 3-shot prompt.
Explanations in these files, with `--config.data.sample.modes="('explain_first',)"` and ground truth
in `--config.data.pair.explanations`, give the paper's hierarchy. Wants the run of igakuqa_cpt.py.
"""

from ml_collections import ConfigDict

from rpo_jax.config import defaults


def get_config(arg: str = "") -> ConfigDict:
    """A few minutes on two cores."""
    config = defaults()
    config.stage = "rpo"
    config.name = "igakuqa-pairs"
    config.init_from = "igakuqa-cpt"

    config.data.source = "candidates"
    config.data.sample.exam = "igakuqa"
    config.data.sample.answers = 0
    config.data.sample.files = ("answers/*.jsonl",)
    config.data.sample.modes = ("answer_only",)
    config.data.pair.strategy = "right_over_wrong"
    config.data.prompt_length = 1280
    config.data.response_length = 16

    config.train.steps = 40
    config.train.batch_rows = 8
    config.train.log_every_steps = 5
    config.train.eval_rows = 64
    config.optim.learning_rate = 1e-3
    config.optim.warmup_steps = 4
    return config
