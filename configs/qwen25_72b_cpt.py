"""Stage 1 of the 72B: continued pretraining of all weights on a TPU slice.

The slice is the argument: `--config=configs/qwen25_72b_cpt.py:v6e:8x8`. `rpo_jax.plan` has the
TPU compiler say what each takes. Wants the converted model, your own text, and the exam whose
questions are kept out of it: IGAKUQA_DIR or data.igakuqa.directory, a copy of the data folder of
github.com/jungokasai/IgakuQA, on every host (or data.corpus.decontaminate=False).
"""

from ml_collections import ConfigDict

from rpo_jax.config import choose, defaults

# Slice -> (data, fsdp, seq, tensor), rows of 4096 tokens a step, remat.
SLICES = {
    "v5p:4x4x4": ((1, 16, 1, 4), 16, "dots"),
    "v5e:16x16": ((1, 64, 1, 4), 64, "mlp"),
    "v6e:8x8": ((1, 16, 1, 4), 16, "mlp"),
    "2*v6e:16x16": ((2, 64, 1, 4), 128, "dots"),
    "tpu7x:4x4x4": ((1, 32, 2, 2), 32, "dots"),
}


def get_config(arg: str = "v5p:4x4x4") -> ConfigDict:
    """1000 steps: at 16 rows a step 66 million tokens, at 128 rows 524 million.

    However long the corpus is: a longer one is not read to its end, a shorter one more than once.
    """
    config = defaults()
    config.stage = "cpt"
    config.name = "qwen25-72b-cpt"
    config.init_from = "models/qwen2.5-72b"
    config.model.shape = "qwen2.5-72b"
    config.model.compute_dtype = "bfloat16"
    config.model.attention = "splash"
    mesh, rows, config.model.remat = choose(SLICES, arg)
    config.mesh.data, config.mesh.fsdp, config.mesh.seq, config.mesh.tensor = mesh

    config.data.train = ("corpus/train/*.jsonl.gz",)
    config.data.heldout = ("corpus/heldout/*.jsonl.gz",)
    config.data.corpus.exams = ("igakuqa",)  # whose questions are kept out of the text
    config.data.row_length = 4096

    config.train.steps = 1000
    config.train.batch_rows = rows
    config.train.eval_rows = 4 * rows
    config.optim.learning_rate = 1e-5
    config.optim.warmup_steps = 50
    config.optim.weight_decay = 0.1
    config.checkpoint.save_every_steps = 100
    return config
