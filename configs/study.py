"""The paper's comparison in the embedded world; the form is the argument.

python -m rpo_jax.study                                        # quick: minutes, shows how it goes
python -m rpo_jax.study --config configs/study.py:standard     # one seed, under an hour
python -m rpo_jax.study --config configs/study.py:reported     # a test world, three seeds, hours
"""

from collections.abc import Iterator
from typing import Any

from ml_collections import ConfigDict

from rpo_jax.config import choose, defaults

# By form: size of the world, network, tokens that its text gets, worlds by number, seeds; steps of
# each game, practised one after the other (in a mixture a small model learns hardly any of them);
# steps of base, CPT and the arms after it; the learning rate of those arms; answers drawn for each
# training question; test questions asked (0: all). Half of a vocabulary may be characters, and it
# holds those of all names (tested): in bytes they are hard to copy.
FORMS: dict[str, dict[str, Any]] = {
    "quick": {
        "size": "quick",
        "shape": "laptop-names",
        "vocabulary": 1664,
        "worlds": (0,),
        "seeds": (0,),
        "games": {"copies": 40, "comparisons": 40, "choices": 30, "riddles": 40},
        "steps": (360, 300, 100),
        "rate": 6e-4,
        "answers": 2,
        "questions": 64,
    },
    "standard": {
        "size": "standard",
        "shape": "laptop-3m",
        "vocabulary": 4096,
        "worlds": (0,),
        "seeds": (0,),
        "games": {"copies": 1200, "comparisons": 800, "choices": 1000, "riddles": 2000},
        "steps": (3000, 2500, 320),
        "rate": 1e-4,
        "answers": 4,
        "questions": 0,
    },
}
FORMS["reported"] = FORMS["standard"] | {
    "worlds": (1001,),
    "seeds": (0, 1, 2),
    "games": {"copies": 1200, "comparisons": 800, "choices": 1000, "riddles": 2500},
    "steps": (5000, 3500, 320),
}


def get_config(arg: str = "quick") -> ConfigDict:
    """What all arms share: preference training on pairs from the answers of the arm's start."""
    form = choose(FORMS, arg)
    config = defaults()
    config.stage = "rpo"
    config.name = "study" + ("" if arg == "quick" else f"-{arg}")
    config.init_from = "cpt"
    config.study.worlds = form["worlds"]
    config.study.seeds = form["seeds"]
    config.study.unexamined = tuple(form["games"])

    config.data.source = "candidates"
    config.data.fictional.size = form["size"]
    config.data.sample.answers = form["answers"]
    config.data.sample.shots = 0
    config.data.sample.explain_tokens = 132
    config.data.sample.slots = 64
    config.data.pair.strategy = "hierarchy"
    config.data.prompt_length = 112
    config.data.response_length = 136
    config.data.row_length = 256
    config.data.row_sizes, config.train.micro_batches = 4, 2  # half of a row of pairs is empty

    # beta and alpha as arXiv:2404.19733v3 found best; its learning rate, 7e-7, was for a 70B model.
    config.rpo.beta = 0.1
    config.rpo.alpha = 1.0
    config.train.steps = form["steps"][2]
    config.train.batch_rows = 8
    config.optim.learning_rate = form["rate"]
    config.optim.warmup_steps = 8

    config.exam.questions = form["questions"]
    config.exam.explain_tokens = 132
    config.exam.slots = 64
    return config


def arms(arg: str = "quick") -> Iterator[tuple[str, dict[str, Any]]]:
    """The paper's two stages, and the controls; alpha = 0 is DPO, no preference is SFT."""
    form = choose(FORMS, arg)
    base, cpt, _ = form["steps"]
    text = {
        "stage": "cpt",
        "data.source": "fictional",
        "train.batch_rows": 4,  # many small steps learn more of the same tokens
        "train.micro_batches": 1,
        "optim.warmup_steps": 20,
        "optim.weight_decay": 0.1,
        "optim.learning_rate": 1e-3,
    }
    start = {
        "init_from": "",
        "model.shape": form["shape"],
        "tokenizer.train_vocab_size": form["vocabulary"],
    }
    for game, steps in form["games"].items():
        yield game, {**text, **start, "data.fictional.text": game, "train.steps": steps}
        start = {"init_from": game}
    yield (
        "base",
        {
            **text,
            **start,
            "data.fictional.text": "general",
            "train.steps": base,
        },
    )
    yield (
        "cpt",
        {
            **text,
            "init_from": "base",
            "data.fictional.text": "both",
            "data.corpus.weights": (0.4, 0.6),  # of general text, replayed, and of the textbook
            "train.steps": cpt,
        },
    )
    yield "cpt-sft", {"rpo.preference": "none"}
    yield "cpt-dpo", {"rpo.alpha": 0.0}
    yield "cpt-rpo", {}
    yield "base-rpo", {"init_from": "base"}
