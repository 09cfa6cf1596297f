"""Our losses and gradients against TRL's own trainers, on the same random Qwen2.

TRL reads text, builds its batch with its own collator, computes its own reference and its own loss;
nothing of it is written again here. Each side gets the same weights, another random model as the
reference, and the same eight pairs.
"""

import dataclasses
from functools import cache, partial

import jax
import numpy as np
import pytest

from rpo_jax.losses.token_logps import Projection
from rpo_jax.model.qwen2 import abstract_params
from rpo_jax.model.shape import shape_to_hf
from rpo_jax.training.objective import target_logps
from rpo_jax.training.step import compute_gradients
from rpo_jax.weights.names import from_hf, list_tensors
from tests.tiny import NETWORK, SHAPE, make_config, make_work, pair_batch, pairs

torch = pytest.importorskip("torch", reason="parity needs the `parity` extra")
trl = pytest.importorskip("trl", reason="parity needs the `parity` extra")
datasets = pytest.importorskip("datasets", reason="parity needs the `parity` extra")
transformers = pytest.importorskip("transformers", reason="parity needs the `parity` extra")

pytestmark = [pytest.mark.full, pytest.mark.filterwarnings("ignore")]  # TRL's own warnings

# The bounds of the project; never to be relaxed.
LOSS_RTOL, GRADIENT_RTOL = 1e-5, 1e-4

EOS = 0
ALPHA, BETA, GAMMA = 0.7, 0.3, 0.4
SMALL = dataclasses.replace(NETWORK, shape=dataclasses.replace(SHAPE, num_hidden_layers=2))


def hf_model(seed):
    """Random weights at which nothing hides: biases and norms are drawn too."""
    torch.manual_seed(seed)
    config = transformers.Qwen2Config(**shape_to_hf(SMALL.shape))
    model = transformers.Qwen2ForCausalLM(config)
    with torch.no_grad():
        for value in model.parameters():
            value.add_(0.1 * torch.randn_like(value))
    return model


def to_ours(tensors):
    """HF tensors (weights or gradients) in our layout, each under its own name."""
    return {
        tensor.name: np.ascontiguousarray(from_hf(tensors[tensor.name].numpy(), tensor))
        for tensor in list_tensors(SMALL.shape)
    }


def find(tree, tensor):
    """The part of our tree that is an HF tensor."""
    for key in tensor.path.split("/"):
        tree = tree[key]
    return tree if tensor.layer is None else tree[tensor.layer]


@cache
def weights(seed):
    """The weights of `hf_model` as our tree."""
    values = to_ours(dict(hf_model(seed).state_dict()))
    params = jax.tree.map(lambda leaf: np.zeros(leaf.shape, leaf.dtype), abstract_params(SMALL))
    for tensor in list_tensors(SMALL.shape):
        find(params, tensor)[...] = values[tensor.name]
    return params


def records():
    """Pairs whose responses are at least two tokens, the last one end-of-text."""
    found = []
    for record in pairs():
        prompt, *responses = (record[f"{k}_ids"] for k in ("prompt", "chosen", "rejected"))
        chosen, rejected = (np.append(ids[:5], EOS).astype(np.int32) for ids in responses)
        found.append({"prompt_ids": prompt, "chosen_ids": chosen, "rejected_ids": rejected})
    return found


def hf_tokenizer():
    """One word an id, so that text is ids in writing."""
    from tokenizers import Tokenizer, models, pre_tokenizers

    words = {"<eos>": EOS} | {f"t{i}": i for i in range(1, SMALL.shape.vocab_size)}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="<eos>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token="<eos>", pad_token="<eos>"
    )


def hf_dataset():
    def text(ids):
        return "".join(f" t{i}" for i in ids if i != EOS)

    names = ("prompt", "chosen", "rejected")
    return datasets.Dataset.from_list([{n: text(r[f"{n}_ids"]) for n in names} for r in records()])


COMMON = {
    "per_device_train_batch_size": 8,
    "max_length": None,
    "use_cpu": True,
    "bf16": False,
    "gradient_checkpointing": False,
    "report_to": "none",
    "remove_unused_columns": True,
    "disable_dropout": True,
}


def dpo_trainer(folder, **changes):
    options = COMMON | {"precompute_ref_log_probs": True, "beta": BETA} | changes
    return trl.DPOTrainer(
        model=hf_model(0),
        ref_model=hf_model(1),
        args=trl.DPOConfig(output_dir=str(folder), **options),
        train_dataset=hf_dataset(),
        processing_class=hf_tokenizer(),
    )


def orpo_trainer(folder):
    from trl.experimental.orpo import ORPOConfig, ORPOTrainer

    options = COMMON | {"max_length": 64, "beta": BETA}
    return ORPOTrainer(
        model=hf_model(0),
        args=ORPOConfig(output_dir=str(folder), **options),
        train_dataset=hf_dataset(),
        processing_class=hf_tokenizer(),
    )


def simpo_trainer(folder):
    from trl.experimental.cpo import CPOConfig, CPOTrainer

    simpo = {"loss_type": "simpo", "simpo_gamma": GAMMA, "cpo_alpha": 0.0, "beta": BETA}
    return CPOTrainer(
        model=hf_model(0),
        args=CPOConfig(output_dir=str(folder), **(COMMON | {"max_length": 64} | simpo)),
        train_dataset=hf_dataset(),
        processing_class=hf_tokenizer(),
    )


def trl_result(trainer):
    """(loss, gradients) of all pairs, as means over the batches of TRL's own loader."""
    model = trainer.model.train()
    losses = []
    loader = trainer.get_train_dataloader()
    for batch in loader:
        loss = trainer.compute_loss(model, batch)
        (loss / len(loader)).backward()
        losses.append(loss.item())
    return np.mean(losses), to_ours({n: p.grad for n, p in model.named_parameters()})


def our_result(**rpo):
    """(loss, gradients) of all pairs."""
    config = make_config(rpo={"alpha": ALPHA, "beta": BETA, "gamma": GAMMA} | rpo)
    prompted = config.rpo.nll_tokens == "prompt+completion"
    batch = pair_batch(records(), prompt_targets=prompted, reference=False)
    work = make_work(config, SMALL)
    if config.rpo.has_reference:
        score = jax.jit(lambda params, batch: target_logps(SMALL, params, batch, Projection(5)))
        batch["reference_logps"] = np.asarray(score(weights(1), batch))
    compute = jax.jit(partial(compute_gradients, work.objective, 1))
    gradients, means = compute(weights(0), {}, work.hyper, batch)
    loss = float(work.objective.loss(means, work.hyper))
    return loss, {t.name: np.asarray(find(gradients, t)) for t in list_tensors(SMALL.shape)}


SIGMOID_SFT = {"loss_type": ["sigmoid", "sft"], "loss_weights": [1.0, ALPHA]}
CASES = {
    "dpo": (partial(dpo_trainer, loss_type=["sigmoid"]), {"alpha": 0.0}),
    "sft": (
        partial(dpo_trainer, loss_type=["sft"]),
        {"alpha": 1.0, "preference": "none", "nll_norm": "batch_tokens"},
    ),
    "rpo, token mean": (partial(dpo_trainer, **SIGMOID_SFT), {"nll_norm": "batch_tokens"}),
    "rpo, eq. 1": (partial(dpo_trainer, **SIGMOID_SFT, per_device_train_batch_size=1), {}),
    "ipo": (
        partial(dpo_trainer, loss_type=["ipo"]),
        {"alpha": 0.0, "preference": "ipo", "length_normalised": True},
    ),
    "dpo, length-normalised": (
        partial(dpo_trainer, loss_type=["sigmoid_norm"]),
        {"alpha": 0.0, "length_normalised": True},
    ),
    "orpo": (
        orpo_trainer,
        {
            "alpha": 1.0,
            "preference": "orpo",
            "nll_tokens": "prompt+completion",
            "nll_norm": "batch_tokens",
        },
    ),
    "simpo": (simpo_trainer, {"alpha": 0.0, "preference": "simpo"}),
}


@pytest.mark.parametrize("make_trainer, rpo", CASES.values(), ids=CASES.keys())
def test_loss_and_gradients_are_those_of_trl(tmp_path, monkeypatch, make_trainer, rpo):
    monkeypatch.setenv("TRL_EXPERIMENTAL_SILENCE", "1")
    wanted, wanted_gradients = trl_result(make_trainer(tmp_path))
    found, gradients = our_result(**rpo)
    np.testing.assert_allclose(found, wanted, rtol=LOSS_RTOL)
    for name, wanted_gradient in wanted_gradients.items():
        norm = np.linalg.norm(wanted_gradient)
        assert norm > 0, name
        assert np.linalg.norm(gradients[name] - wanted_gradient) < GRADIENT_RTOL * norm, name
