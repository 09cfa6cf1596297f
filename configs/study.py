"""The paper's comparison in the embedded world; the form is the argument.

python -m rpo_jax.study                                        # quick: minutes, shows how it goes
python -m rpo_jax.study --config configs/study.py:standard     # one seed, an hour on two cores
python -m rpo_jax.study --config configs/study.py:reported     # test worlds, three seeds, hours
"""

from collections.abc import Iterator
from typing import Any

from ml_collections import ConfigDict

from rpo_jax.config import choose, defaults

# By form: size of the world, network, tokens that its text gets, worlds by number, seeds; steps of
# copying, games, base, CPT and the arms after it; the learning rate of those arms; answers drawn
# for each training question; test questions asked (0: all). Half of a vocabulary may be characters:
# it has room for those of all names, which in bytes are hard to copy.
FORMS: dict[str, dict[str, Any]] = {
    "quick": {
        "size": "quick",
        "shape": "laptop-names",
        "vocabulary": 1664,
        "worlds": (0,),
        "seeds": (0,),
        "steps": (60, 60, 400, 300, 100),
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
        "steps": (1200, 1500, 5000, 3500, 320),
        "rate": 1e-4,
        "answers": 4,
        "questions": 0,
    },
    "reported": {
        "size": "standard",
        "shape": "laptop-3m",
        "vocabulary": 4096,
        "worlds": (1000,),
        "seeds": (0, 1, 2),
        "steps": (1200, 1500, 5000, 3500, 320),
        "rate": 1e-4,
        "answers": 4,
        "questions": 0,
    },
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
    config.study.unexamined = ("copying", "games")

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

    # beta and alpha as arXiv:2404.19733v3 found best; its learning rate, 7e-7, was for a 70B model.
    config.rpo.beta = 0.1
    config.rpo.alpha = 1.0
    config.train.steps = form["steps"][4]
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
    copying, games, base, cpt, _ = form["steps"]
    text = {
        "stage": "cpt",
        "data.source": "fictional",
        "train.batch_rows": 4,  # many small steps learn more of the same tokens
        "optim.warmup_steps": 20,
        "optim.weight_decay": 0.1,
        "optim.learning_rate": 1e-3,
    }
    # Copying first: words that mean nothing, said twice, teach it in minutes, mixed text does not.
    yield (
        "copying",
        {
            **text,
            "init_from": "",
            "model.shape": form["shape"],
            "tokenizer.train_vocab_size": form["vocabulary"],
            "data.fictional.text": "copies",
            "train.steps": copying,
        },
    )
    yield (
        "games",
        {
            **text,
            "init_from": "copying",
            "data.fictional.text": "games",
            "train.steps": games,
        },
    )
    yield (
        "base",
        {
            **text,
            "init_from": "games",
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
