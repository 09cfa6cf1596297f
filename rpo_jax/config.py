"""The configuration of a run: frozen dataclasses, strict conversion, one place for every default.

A config file defines `get_config(arg="")`, which takes `defaults()`, changes what differs and
returns it. The commands turn the result into a `Config` once, with `resolve`; after that nothing is
a string that should have been a number, and nothing is misspelt.
"""

import dataclasses
import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from rpo_jax import fields
from rpo_jax.errors import UserError
from rpo_jax.fields import option, required

# Peak learning rates by stage and by whether adapters are trained.
_LEARNING_RATES = {
    ("cpt", False): 1e-5,
    ("rpo", False): 7e-7,
    ("cpt", True): 2e-4,
    ("rpo", True): 1e-5,
}
MODES = ("answer_only", "explain_first")  # ways of asking an exam's questions


@dataclass(frozen=True, kw_only=True)
class Model:
    """Which network, in which precision, by which implementation."""

    shape: str = option(
        "",
        "a shipped shape (rpo_jax/model/shapes), a path to an HF config.json, or empty for the "
        "shape of `init_from`",
    )
    param_dtype: str = option(
        "float32",
        "dtype of the weights (adapters and the optimizer's moments are float32 always)",
        choices=("float32", "bfloat16"),
    )
    compute_dtype: str = option(
        "float32", "dtype of activations and matmul inputs", choices=("float32", "bfloat16")
    )
    remat: str = option(
        "none",
        "what the backward pass recomputes, from the least memory to the most: full, whole layers; "
        "attention, all but attention itself; mlp, the MLPs only; dots, what is not a matmul; none",
        choices=("full", "attention", "mlp", "dots", "none"),
    )
    offload: bool = option(
        False, "what remat keeps, the inputs of layers too, waits in the memory of the host"
    )
    scan_layers: bool = option(True, "lower one layer and scan it, or unroll all of them")
    attention: str = option(
        "dense",
        "implementation: dense holds the scores of a whole row; blocks those of 128 queries, and "
        "skips the keys after them; both run anywhere; splash is the TPU kernel, which holds a "
        "block; splash_interpreted is the kernel's program step by step on a CPU, to check it",
        choices=("dense", "blocks", "splash", "splash_interpreted"),
    )
    used_vocab_size: int = option(
        0,
        "ids from here on are padding of the tables, no tokens, and have probability 0; 0: every "
        "row counts, as in transformers",
        at_least=0,
    )


@dataclass(frozen=True, kw_only=True)
class Tokenizer:
    """Text to ids."""

    path: str = option(
        "",
        "an HF tokenizer.json or a SentencePiece .model; empty: the tokenizer of `init_from`, or, "
        "for a run from random weights, a SentencePiece model trained on its text",
    )
    train_vocab_size: int = option(
        2048, "size of a SentencePiece model trained on the run's text", at_least=300
    )
    end_of_text: str = option(
        "", "token that ends documents and responses; empty: the tokenizer's own (<|endoftext|>)"
    )


@dataclass(frozen=True, kw_only=True)
class Fictional:
    """The embedded world: a closed, invented medicine. Seeds from 1000 on are test worlds."""

    seed: int = option(0, "number of the world", at_least=0)
    size: str = option("quick", "preset", choices=("tiny", "quick", "standard"))
    text: str = option(
        "textbook",
        "passages of a cpt stage: copies, comparisons, choices or riddles (words without a meaning "
        "said twice, compared, chosen, asked for); general (language and answer formats), "
        "textbook, or both of these",
        choices=("copies", "comparisons", "choices", "riddles", "general", "textbook", "both"),
    )


@dataclass(frozen=True, kw_only=True)
class Igakuqa:
    """The Japanese medical licensing exam, from a copy that the user fetched."""

    directory: str = option("", "folder that holds 2018..2022; empty: $IGAKUQA_DIR")
    train_years: tuple[int, ...] = option((2018, 2019, 2020, 2021), "years trained on")
    heldout_years: tuple[int, ...] = option((2022,), "years held out")


@dataclass(frozen=True, kw_only=True)
class Sample:
    """Answers to an exam's training questions, drawn from the model in `init_from` and judged."""

    exam: str = option(
        "fictional",
        "whose questions: fictional (those of data.fictional for training), or an exam of "
        "rpo_jax/exams/known in data.igakuqa.directory (those of data.igakuqa.train_years)",
    )
    limit: int = option(0, "so many questions, evenly spread; 0: all", at_least=0)
    answers: int = option(
        8,
        "drawn for each question and mode; 0: those of `files` alone (arXiv:2404.19733v3: 30)",
        at_least=0,
    )
    files: tuple[str, ...] = option(
        (), "answers that were made elsewhere, .jsonl with id and text, or published predictions"
    )
    modes: tuple[str, ...] = option(
        ("explain_first",), "explain_first, answer_only, or both: of the questions and of the pairs"
    )
    shots: int = option(3, "demonstrations in the prompt, 3 or 0", at_least=0)
    temperature: float = option(0.8, "logits are divided by it", above=0.0)
    top_k: int = option(0, "draw among so many tokens; 0: all", at_least=0)
    top_p: float = option(1.0, "draw among so much probability", above=0.0, at_most=1.0)
    answer_tokens: int = option(32, "most tokens of an answer alone", at_least=1)
    explain_tokens: int = option(512, "most tokens of an explanation with its answer", at_least=1)
    first_seed: int = option(
        0, "the answers of a question have it and those that follow", at_least=0
    )
    slots: int = option(16, "answers that are written at a time; never changes one", at_least=1)


@dataclass(frozen=True, kw_only=True)
class Pair:
    """Preference pairs from judged answers and ground-truth explanations."""

    strategy: str = option(
        "hierarchy",
        "right_over_wrong: of the drawn answers (arXiv:2404.19733); truth_over_wrong, "
        "truth_over_any: the ground truth over wrong ones, or over whatever was drawn; hierarchy: "
        "ground truth over right over wrong (arXiv:2504.18080)",
        choices=("right_over_wrong", "truth_over_wrong", "truth_over_any", "hierarchy"),
    )
    pairs_per_question: int = option(
        4, "most pairs of a question in each mode (arXiv:2404.19733v3: 10 to 20)", at_least=1
    )
    explanations: tuple[str, ...] = option(
        (),
        "ground-truth explanations, .jsonl with id and text; they come before those that the exam "
        "itself has",
    )
    max_length_ratio: float = option(
        4.0, "most times that one text of a pair may be longer than the other", at_least=1.0
    )
    max_similarity: float = option(
        1.0,
        "most that texts of a pair may share: of the 3-grams of either, those in both; 1: anything "
        "but the same text",
        above=0.0,
        at_most=1.0,
    )
    max_letter_ratio: float = option(
        2.0,
        "a letter may be dispreferred at most so many times as often as it is preferred (and one "
        "time more), or pairs that disprefer it are left out; 0: however often",
        at_least=0.0,
    )
    heldout_share: float = option(
        0.1,
        "of the questions, with all that are like them, whose pairs are held out",
        above=0.0,
        below=1.0,
    )
    leak_share: float = option(
        0.5,
        "a question that holds so much of an evaluation question's text (its 8-grams) is left out; "
        "questions as like each other are held out together",
        above=0.0,
        at_most=1.0,
    )
    max_left_out_share: float = option(
        0.9,
        "stop if a larger share of the answers is of no use, or of the questions gets no pair",
        at_least=0.0,
        at_most=1.0,
    )


@dataclass(frozen=True, kw_only=True)
class Corpus:
    """Which documents of a cpt stage become records. Held-out files are taken as they are."""

    text_field: str = option("text", "field or column that holds the text (.jsonl, .parquet)")
    id_field: str = option("id", "field or column that holds a document's id, where it has one")
    epochs: tuple[float, ...] = option(
        (),
        "passes over what each pattern of data.train matches (with data.fictional.text=both: over "
        "general passages and textbook); 2.5 takes every document twice and half of them, chosen "
        "by content, once more; empty: 1 each",
    )
    weights: tuple[float, ...] = option(
        (),
        "shares of the same in the characters trained on; `epochs` are then the most passes over "
        "each; empty: as much as there is",
    )
    heldout_share: float = option(
        0.0,
        "share of the documents of data.train held out, chosen by content, besides data.heldout",
        at_least=0.0,
        below=1.0,
    )
    min_characters: int = option(0, "shorter documents are left out", at_least=0)
    max_characters: int = option(0, "longer documents are left out; 0: none", at_least=0)
    min_kana_share: float = option(
        0.0,
        "documents with a smaller share of kana among their letters are left out: Japanese has "
        "about 0.5, Chinese and English 0",
        at_least=0.0,
        at_most=1.0,
    )
    max_repetition: float = option(
        1.0,
        "documents in which a larger share of the runs of 10 letters stood before are left out",
        at_least=0.0,
        at_most=1.0,
    )
    boilerplate_lines: tuple[str, ...] = option(
        (), "regular expressions; lines that one of them is found in are taken out of documents"
    )
    drop_copies: bool = option(True, "of documents with the same text, one is kept")
    near_copies: float = option(
        0.0,
        "of documents whose 5-grams are alike from this on (Jaccard, by MinHash), one is kept; 0: "
        "all are",
        at_least=0.0,
        at_most=1.0,
    )
    decontaminate: bool = option(
        True, "leave out documents that hold a question the run is evaluated on (see `exams`)"
    )
    exams: tuple[str, ...] = option(
        (),
        "whose questions: names of exams, a year after a colon (igakuqa:2022), or .jsonl files "
        "with `text`; igakuqa is in data.igakuqa.directory or $IGAKUQA_DIR; empty: what the "
        "source holds out, or, for files, every exam that an environment variable leads to",
    )
    max_overlap: float = option(
        0.5,
        "a document holds a question if it has more than this share of its runs of 13 letters",
        at_least=0.0,
        below=1.0,
    )
    long_documents: str = option(
        "continue",
        "continue: a document is cut where a row ends and goes on in the next; best_fit: one that "
        "fits into a row is never cut; drop: the same, and longer ones are left out",
        choices=("continue", "best_fit", "drop"),
    )
    shard_mib: int = option(16, "MiB of input (as it lies on the disk) a shard", at_least=1)
    max_filtered_share: float = option(
        0.5,
        "stop if filters, copies and questions take a larger share of the documents",
        at_least=0.0,
        at_most=1.0,
    )


@dataclass(frozen=True, kw_only=True)
class Data:
    """Where text and pairs come from, and how they become records."""

    source: str = option(
        "files",
        "origin of the text or pairs; candidates: pairs made of judged answers, by data.sample and "
        "data.pair",
        choices=("files", "fictional", "igakuqa", "candidates"),
    )
    train: tuple[str, ...] = option(
        (),
        "source=files: text (.jsonl, .parquet, .txt, also .gz and .zst, also gs://) or preference "
        "JSONL; globs",
    )
    heldout: tuple[str, ...] = option((), "source=files: the same, held out")
    general: tuple[str, ...] = option(
        (), "general text held out besides (cpt): globs; its nats/token tell what a run forgets"
    )
    fictional: Fictional = dataclasses.field(default_factory=Fictional)
    igakuqa: Igakuqa = dataclasses.field(default_factory=Igakuqa)
    sample: Sample = dataclasses.field(default_factory=Sample)
    pair: Pair = dataclasses.field(default_factory=Pair)
    corpus: Corpus = dataclasses.field(default_factory=Corpus)
    workers: int = option(
        0, "processes that make text records; 0: one a core; never changes a byte", at_least=0
    )
    row_length: int = option(512, "tokens a packed row (cpt)", at_least=8)
    prompt_length: int = option(384, "most tokens of a pair's prompt (rpo)", at_least=1)
    response_length: int = option(
        128, "most tokens of each response of a pair, its end of text included", at_least=2
    )
    pairs_per_row: int = option(
        1,
        "most pairs in one row, which is as long as the longest pair may be; of a global batch in "
        "train.micro_batches, those that are left empty are not computed; never changes a number",
        at_least=1,
    )
    row_sizes: int = option(
        1,
        "lengths that rows of pairs are computed in: with n, each micro-batch in the least of 1/n, "
        "2/n, ... 1 of the row that holds it, like with like; never changes a number",
        at_least=1,
    )
    max_dropped_share: float = option(
        0.01,
        "stop if a larger share of the input cannot become records",
        at_least=0.0,
        at_most=1.0,
    )


@dataclass(frozen=True, kw_only=True)
class Rpo:
    """Reasoning Preference Optimization, arXiv:2404.19733v3 eq. 1 (defaults: its section 4)."""

    preference: str = option(
        "dpo",
        "term that prefers chosen to rejected: dpo, ipo, simpo, orpo, or none (the NLL term alone, "
        "SFT); the last three have no reference",
        choices=("dpo", "ipo", "simpo", "orpo", "none"),
    )
    length_normalised: bool = option(
        False, "dpo, ipo: log-ratios are means over the tokens of a response and not sums"
    )
    beta: float = option(
        0.1,
        "inverse temperature of dpo and simpo, regularisation (tau) of ipo, weight of orpo",
        above=0.0,
    )
    alpha: float = option(1.0, "weight of the NLL term; 0 is the preference alone", at_least=0.0)
    gamma: float = option(
        0.5,
        "simpo: what beta times the difference of nats a token is to exceed (arXiv:2405.14734 "
        "takes beta 2 and more)",
        at_least=0.0,
    )
    label_smoothing: float = option(
        0.0, "dpo: probability that a preference is the wrong way round", at_least=0.0, below=0.5
    )
    nll_tokens: str = option(
        "completion",
        "tokens of the NLL term: the chosen response, or its prompt too (as ORPO takes it)",
        choices=("completion", "prompt+completion"),
    )
    nll_norm: str = option(
        "sequence",
        "sequence: each NLL over its own length, then the mean over pairs (eq. 1); batch_tokens: "
        "one token mean over the global batch (TRL)",
        choices=("sequence", "batch_tokens"),
    )
    share_prefix: bool = option(
        True, "one copy of the prompt serves both responses of a pair; never changes a number"
    )
    reference: str = option(
        "stored",
        "where the reference's log-probabilities come from: computed once and stored, or live, in "
        "each step once more, from the frozen weights without their adapters",
        choices=("stored", "live"),
    )
    term_gradients_every_steps: int = option(
        0,
        "measure the gradient norm of each term (of the NLL without rpo.alpha) and the cosine "
        "between them; 0: never",
        at_least=0,
    )

    @property
    def has_reference(self) -> bool:
        """Whether the loss compares with the model that the stage starts from."""
        return self.preference in ("dpo", "ipo")

    @property
    def stores_reference(self) -> bool:
        """Whether its log-probabilities come with the records."""
        return self.has_reference and self.reference == "stored"


TARGETS = ("q", "k", "v", "o", "gate", "up", "down")


@dataclass(frozen=True, kw_only=True)
class Lora:
    """Low-rank adapters over a frozen base, arXiv:2106.09685; QLoRA where the base is quantised."""

    rank: int = option(0, "of the adapters; 0: none, all weights are trained", at_least=0)
    alpha: float = option(16.0, "an adapter's product is scaled by alpha / rank", above=0.0)
    targets: tuple[str, ...] = option(TARGETS, "projections that get an adapter")
    dropout: float = option(
        0.0, "share of an adapter's inputs set to 0 in training", at_least=0.0, below=1.0
    )
    init: str = option(
        "b_zero", "the factor that begins as zeros, in x A B", choices=("b_zero", "a_zero")
    )
    quantize: str = option(
        "",
        "form in which the frozen kernels are held; empty: param_dtype",
        choices=("", "int8", "nf4"),
    )
    trained_tokens: tuple[str, ...] = option(
        (),
        "tokens whose rows of the embedding and the head are trained beside the adapters; the "
        "head's gradient then takes the memory of the head",
    )
    previous: str = option(
        "merge",
        "what becomes of the adapters of the run in init_from: merged into the base, or kept and "
        "trained on; either way the reference is the model that run made",
        choices=("merge", "keep"),
    )


@dataclass(frozen=True, kw_only=True)
class Optim:
    """AdamW, clipping and the learning-rate schedule."""

    learning_rate: float = option(
        0.0,
        "peak learning rate; 0: by method, cpt 1e-5 and rpo 7e-7 for all weights (the latter as in "
        "arXiv:2404.19733v3), 2e-4 and 1e-5 for adapters",
        at_least=0.0,
    )
    schedule: str = option("cosine", "after the warm-up", choices=("constant", "cosine"))
    warmup_steps: int = option(0, "linear from 0", at_least=0)
    final_fraction: float = option(
        0.1, "of the peak, at the last step of a cosine", at_least=0.0, at_most=1.0
    )
    b1: float = option(0.9, "decay of the first moment", at_least=0.0, below=1.0)
    b2: float = option(0.95, "decay of the second moment", at_least=0.0, below=1.0)
    eps: float = option(1e-8, "added to the root of the second moment", above=0.0)
    weight_decay: float = option(
        0.0, "decoupled; matrices only, never norms or biases", at_least=0.0
    )
    clip_norm: float = option(1.0, "global gradient norm; 0 does not clip", at_least=0.0)


@dataclass(frozen=True, kw_only=True)
class Mesh:
    """Devices a mesh axis; one axis may be -1: whatever is left."""

    data: int = option(-1, "replicas of the weights", at_least=-1)
    fsdp: int = option(1, "shards of weights and optimizer state, and of the batch", at_least=-1)
    seq: int = option(1, "shards of a row", at_least=-1)
    tensor: int = option(1, "shards of heads, MLP and vocabulary", at_least=-1)


@dataclass(frozen=True, kw_only=True)
class Train:
    """The loop."""

    steps: int = required("optimizer steps", at_least=1)
    batch_rows: int = required("rows of the global batch", at_least=1)
    micro_batches: int = option(
        1, "parts the global batch is cut into, one after the other", at_least=1
    )
    loss_chunk: int = option(256, "positions of each row whose logits exist at a time", at_least=1)
    keep_logits: bool = option(
        False,
        "keep the logits of all chunks for the backward pass, 4 bytes a position and vocabulary "
        "row, or compute them again",
    )
    log_every_steps: int = option(10, "metrics", at_least=1)
    eval_every_steps: int = option(
        0, "held-out measures during the run; 0: before and after only", at_least=0
    )
    eval_rows: int = option(256, "held-out rows looked at; 0: all", at_least=0)


@dataclass(frozen=True, kw_only=True)
class Exam:
    """A dev exam that the model takes while it trains; test questions are refused."""

    name: str = option("", "which one, see `evaluate --help`; empty: none")
    directory: str = option(
        "", "folder of its years; empty: as for `evaluate`, that of the run's own world included"
    )
    years: tuple[int, ...] = option((), "of its dev years; empty: all of them")
    questions: int = option(64, "asked, evenly spread over these years; 0: all", at_least=0)
    every_steps: int = option(
        0, "steps between two sittings; 0: before and after training only", at_least=0
    )
    modes: tuple[str, ...] = option(MODES, "ways of asking")
    answer_tokens: int = option(32, "most tokens of an answer alone", at_least=1)
    explain_tokens: int = option(512, "most tokens of an explanation with its answer", at_least=1)
    slots: int = option(16, "answers written at a time", at_least=1)


@dataclass(frozen=True, kw_only=True)
class Checkpoint:
    """What is kept."""

    save_every_steps: int = option(100, "besides the last step", at_least=1)
    keep: int = option(2, "newest checkpoints kept", at_least=1)
    directory: str = option(
        "",
        "folder, such as gs://bucket/checkpoints, in which a folder of the run's name holds them; "
        "empty: the run's own folder",
    )
    best: str = option(
        "",
        "way of asking of the dev exam whose best checkpoint is kept too, by points read out of "
        "the text, of equals the newest; every sitting is then saved; empty: none",
        choices=("", *MODES),
    )


@dataclass(frozen=True, kw_only=True)
class Log:
    """Who is told."""

    tensorboard: bool = option(True, "write event files")
    wandb_project: str = option("", "Weights & Biases project; empty: off (extra `wandb`)")


@dataclass(frozen=True, kw_only=True)
class Rounds:
    """Iterative RPO, `rpo_jax.iterate`: sample, pair, train; then again from what was trained."""

    count: int = option(2, "rounds; each is a run of its own, <name>-1, <name>-2, ...", at_least=1)
    temperatures: tuple[float, ...] = option(
        (), "of data.sample, a round each, the last one also after it; empty: as there"
    )


@dataclass(frozen=True, kw_only=True)
class Study:
    """Arms side by side, `rpo_jax.study`; `exam` says how all of them are asked."""

    worlds: tuple[int, ...] = option(
        (0,), "data.fictional.seed of each world; from 1000 on they are kept for what is reported"
    )
    seeds: tuple[int, ...] = option((0,), "of each world")
    start: str = option(
        "cpt",
        "the arm that others are compared with, question by question; what it comes from is "
        "trained once a world, with the first seed",
    )
    unexamined: tuple[str, ...] = option((), "arms that others start from, and no more")


@dataclass(frozen=True, kw_only=True)
class Config:
    """One run."""

    stage: str = required("what is trained", choices=("cpt", "rpo"))
    name: str = required("name of the run: its folder under `workdir`")
    workdir: str = option("runs", "where runs and prepared data go")
    seed: int = option(0, "of initialisation and order", at_least=0)
    init_from: str = option(
        "",
        "where the first weights come from: a run of this `workdir` by its name, or the path "
        "(with a /) of a run's or a converted model's folder; empty: random",
    )
    model: Model = dataclasses.field(default_factory=Model)
    tokenizer: Tokenizer = dataclasses.field(default_factory=Tokenizer)
    data: Data = dataclasses.field(default_factory=Data)
    rpo: Rpo = dataclasses.field(default_factory=Rpo)
    lora: Lora = dataclasses.field(default_factory=Lora)
    optim: Optim = dataclasses.field(default_factory=Optim)
    mesh: Mesh = dataclasses.field(default_factory=Mesh)
    train: Train = dataclasses.field(default_factory=Train)  # type: ignore[arg-type]
    exam: Exam = dataclasses.field(default_factory=Exam)
    checkpoint: Checkpoint = dataclasses.field(default_factory=Checkpoint)
    log: Log = dataclasses.field(default_factory=Log)
    rounds: Rounds = dataclasses.field(default_factory=Rounds)
    study: Study = dataclasses.field(default_factory=Study)

    @property
    def folder(self) -> Path:
        """Where the run keeps everything."""
        return Path(self.workdir) / self.name

    @property
    def origin(self) -> Path | None:
        """The model folder that the first weights come from; None: random weights."""
        if not self.init_from:
            return None
        return Path(self.init_from if "/" in self.init_from else f"{self.workdir}/{self.init_from}")

    @property
    def origin_hint(self) -> str:
        """For a message that `origin` lacks something: what may be meant instead."""
        if "/" in self.init_from:
            return ""
        if Path(self.init_from).is_dir():
            return (
                f"; a bare name is a run in {self.workdir}: for the folder here, ./{self.init_from}"
            )
        found = sorted(path.parts[-3] for path in Path(self.workdir).glob("*/model/config.json"))
        return f"; {self.workdir} holds {', '.join(found) or 'no runs'}"


def defaults() -> ConfigDict:
    """Every field of `Config`, at its default; a required one is an empty placeholder."""
    return fields.defaults(Config).lock()


def choose(table: Mapping[str, Any], name: str) -> Any:
    """What a config file's argument names, as in `--config=configs/study.py:standard`.

    Raises:
        LookupError: it names nothing; tells what there is.
    """
    if name not in table:  # a ValueError, such as our own, would come wrapped in a traceback
        raise LookupError(f"the argument {name!r} is none of {', '.join(table)}")
    return table[name]


def resolve(values: Mapping[str, Any] | ConfigDict) -> Config:
    """Turns what a config file returned into a `Config`.

    Raises:
        UserError: one line for each unknown, missing, mistyped or out-of-range field, with its
            dotted name, the value and what is allowed; then for each contradiction between fields.
    """
    problems: list[str] = []
    config = fields.build(Config, values, problems)
    if not problems:
        problems = list(_contradictions(config))
    if problems:
        raise UserError("\n".join(f"config: {problem}" for problem in problems))
    if not config.optim.learning_rate:
        rate = _LEARNING_RATES[config.stage, config.lora.rank > 0]
        config = replace(config, optim=replace(config.optim, learning_rate=rate))
    return config


def _contradictions(config: Config) -> Iterator[str]:
    train, mesh, data = config.train, config.mesh, config.data
    if train.batch_rows % train.micro_batches:
        yield (
            f"train.batch_rows={train.batch_rows} is not a multiple of "
            f"train.micro_batches={train.micro_batches}"
        )
    if config.model.offload and config.model.remat == "none":
        yield "model.offload=True: remat='none' lets the compiler choose what is kept; name another"
    sizes = dataclasses.asdict(mesh)
    if any(size == 0 for size in sizes.values()):
        yield f"mesh={sizes}: an axis has at least one device, or -1 for what is left"
    if sum(size == -1 for size in sizes.values()) > 1:
        yield f"mesh={sizes}: at most one axis may be -1"
    if config.optim.warmup_steps >= train.steps:
        yield (
            f"optim.warmup_steps={config.optim.warmup_steps} leaves nothing of "
            f"train.steps={train.steps}: the learning rate would never arrive; set fewer steps of "
            "warm-up, or train for more"
        )
    if data.source == "files":
        if not data.train:
            yield "data.train is empty: data.source=files needs files"
        if not data.heldout and not (config.stage == "cpt" and data.corpus.heldout_share):
            yield (
                "data.heldout is empty: data.source=files needs files (or, in a cpt stage, "
                "data.corpus.heldout_share)"
            )
    yield from _corpus_contradictions(data)
    if data.source == "igakuqa":
        both = set(data.igakuqa.train_years) & set(data.igakuqa.heldout_years)
        if both:
            yield f"data.igakuqa: {sorted(both)} is both trained on and held out"
    if data.source == "candidates":
        if config.stage != "rpo":
            yield f"data.source='candidates': pairs are of stage=rpo, not {config.stage}"
        if not data.sample.answers and not data.sample.files:
            yield "data.sample.answers=0 and data.sample.files is empty: there are no answers"
        if not data.sample.modes or not set(data.sample.modes) <= set(MODES):
            yield f"data.sample.modes={data.sample.modes}: {' or '.join(MODES)} or both are wanted"
    if any(temperature <= 0 for temperature in config.rounds.temperatures):
        yield f"rounds.temperatures={config.rounds.temperatures}: each must be above 0"
    if config.stage == "rpo" and data.general:
        yield f"data.general={data.general}: only a cpt stage measures nats/token of text"
    if config.stage == "rpo" and not config.init_from:
        yield "init_from is empty: stage=rpo prefers against the model it starts from"
    rpo = config.rpo
    if rpo.length_normalised and not rpo.has_reference:
        yield f"rpo.length_normalised=True: rpo.preference={rpo.preference!r} has no log-ratios"
    if rpo.label_smoothing and rpo.preference != "dpo":
        yield f"rpo.label_smoothing={rpo.label_smoothing}: only rpo.preference='dpo' knows it"
    if rpo.gamma != Rpo().gamma and rpo.preference != "simpo":
        yield f"rpo.gamma={rpo.gamma}: only rpo.preference='simpo' knows it"
    if rpo.beta != Rpo().beta and rpo.preference == "none":
        yield f"rpo.beta={rpo.beta}: rpo.preference='none' has no use for it"
    if rpo.preference == "none" and not rpo.alpha:
        yield "rpo.preference='none' with rpo.alpha=0 leaves no loss"
    lora = config.lora
    if rpo.reference == "live" and not (rpo.has_reference and lora.rank):
        yield (
            "rpo.reference='live' is the model without its adapters: it needs lora.rank, and an "
            "rpo.preference that has a reference (dpo, ipo)"
        )
    if rpo.reference == "live" and lora.previous == "keep":
        yield (
            "rpo.reference='live' with lora.previous='keep': without the adapters that are kept it "
            "is the model from before them; merge them, or store the reference"
        )
    for name in lora.targets:
        if name not in TARGETS:
            yield f"lora.targets: {name!r} is none of {', '.join(TARGETS)}"
    if lora.rank and not lora.targets:
        yield f"lora.rank={lora.rank} with empty lora.targets leaves nothing to train"
    if lora.rank and not config.init_from:
        yield f"lora.rank={lora.rank}: init_from is empty, and adapters need a model to adapt"
    if lora.trained_tokens and not lora.rank:
        yield f"lora.trained_tokens={lora.trained_tokens}: without lora.rank all rows are trained"
    if lora.quantize and not lora.rank:
        yield f"lora.quantize={lora.quantize!r}: quantised weights are frozen; set lora.rank too"
    if not config.init_from and not config.model.shape:
        yield "model.shape is empty, and there is no init_from to take the shape from"
    exam = config.exam
    for mode in exam.modes:
        if mode not in MODES:
            yield f"exam.modes: {mode!r} is none of {', '.join(MODES)}"
    if config.checkpoint.best and not (exam.name and config.checkpoint.best in exam.modes):
        yield (
            f"checkpoint.best={config.checkpoint.best!r}: exam.name={exam.name!r} with "
            f"exam.modes={exam.modes} never asks that way"
        )
    if exam.every_steps and not exam.name:
        yield f"exam.every_steps={exam.every_steps}: exam.name is empty, so nothing would be asked"
    if config.name in ("", ".", "..", "data") or set("/\\") & set(config.name):
        yield f"name={config.name!r}: a folder name is wanted, and not `data`, where records lie"


def _corpus_contradictions(data: Data) -> Iterator[str]:
    corpus = data.corpus
    if len(set(data.train)) < len(data.train):
        yield f"data.train={data.train}: a pattern stands there twice; set data.corpus.epochs"
    both = data.source == "fictional" and data.fictional.text == "both"
    mixed = len(data.train) if data.source == "files" else 2 * both
    for name in ("epochs", "weights"):
        values = getattr(corpus, name)
        if values and len(values) != mixed:
            yield (
                f"data.corpus.{name}={values}: one for each pattern of data.train is wanted, or "
                "two (general, textbook) with data.source=fictional and data.fictional.text=both"
            )
        if any(not 0 <= value < math.inf for value in values) or (values and not any(values)):
            yield f"data.corpus.{name}={values}: numbers from 0 on are wanted, not all 0"
    for pattern in corpus.boilerplate_lines:
        try:
            re.compile(pattern)
        except re.error as error:
            yield f"data.corpus.boilerplate_lines: {pattern!r} is no regular expression ({error})"
    if 0 < corpus.max_characters < corpus.min_characters:
        yield (
            f"data.corpus.max_characters={corpus.max_characters} is below min_characters="
            f"{corpus.min_characters}"
        )


def describe() -> str:
    """Every field, a line each, by section. For `--help`."""
    return "\n".join(fields.describe(Config))


def explain(name: str) -> str:
    """A field, or the fields of a section, with all that is known of them. For `--help=NAME`."""
    return "\n".join(fields.explain(Config, name))


def field_names() -> list[str]:
    """Every field and section of `Config` by its dotted name."""
    return list(fields.names(Config))


def to_dict(config: Config) -> dict[str, Any]:
    """The config as nested plain dicts, ready for JSON; `resolve` reads it back."""
    return dataclasses.asdict(config)
