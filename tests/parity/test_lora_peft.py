"""Adapters against PEFT: the same logits from the same files, TRL's gradients of both factors."""

import dataclasses
from functools import partial

import jax
import numpy as np
import pytest
from etils import epath

from rpo_jax.config import Lora
from rpo_jax.losses.token_logps import Projection
from rpo_jax.model.qwen2 import forward, head_table
from rpo_jax.training.objective import target_logps
from rpo_jax.training.step import compute_gradients
from rpo_jax.weights.adapters import read_peft, write_peft
from tests.parity.test_rpo_trl import (
    ALPHA,
    BETA,
    COMMON,
    GRADIENT_RTOL,
    LOSS_RTOL,
    SIGMOID_SFT,
    SMALL,
    hf_dataset,
    hf_model,
    hf_tokenizer,
    records,
    weights,
)
from tests.tiny import make_config, make_work, pair_batch

torch = pytest.importorskip("torch", reason="parity needs the `parity` extra")
trl = pytest.importorskip("trl", reason="parity needs the `parity` extra")
peft = pytest.importorskip("peft", reason="parity needs the `parity` extra")

pytestmark = [pytest.mark.full, pytest.mark.filterwarnings("ignore")]

MODULES = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
LORA = Lora(rank=3, alpha=6.0)
NETWORK = dataclasses.replace(SMALL, lora=LORA)


def draw(model):
    """Both factors of every adapter away from zero."""
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for name, value in model.named_parameters():
            if "lora_" in name:
                value.copy_(0.3 * torch.randn(value.shape, generator=generator))
    return model


def peft_model():
    config = peft.LoraConfig(
        r=3, lora_alpha=6, target_modules=MODULES, lora_dropout=0.0, task_type="CAUSAL_LM"
    )
    return draw(peft.get_peft_model(hf_model(0), config))


def logits(network, params, tokens):
    ones = np.ones_like(tokens)
    positions = np.broadcast_to(np.arange(tokens.shape[1], dtype=np.int32), tokens.shape)

    def run(params, *ids):
        return forward(network, params, *ids) @ head_table(params).T

    return np.asarray(jax.jit(run)(params, tokens, ones, 0 * ones, positions))


def peft_logits(model, tokens):
    with torch.no_grad():
        return model(input_ids=torch.from_numpy(tokens.astype(np.int64))).logits.numpy()


def test_files_go_in_and_out(tmp_path):
    tokens = np.random.default_rng(0).integers(1, 90, (4, 20)).astype(np.int32)
    theirs = peft_model()
    theirs.save_pretrained(tmp_path / "theirs")
    lora, pairs = read_peft(epath.Path(tmp_path / "theirs"), SMALL.shape)
    assert (lora.rank, lora.alpha, lora.targets) == (LORA.rank, LORA.alpha, LORA.targets)
    ours = logits(NETWORK, {**weights(0), "lora": pairs}, tokens)
    wanted = peft_logits(theirs, tokens)
    np.testing.assert_allclose(ours, wanted, atol=1e-4 * np.abs(wanted).max())
    assert np.abs(wanted - peft_logits(hf_model(0), tokens)).max() > 0.1

    write_peft(epath.Path(tmp_path / "ours"), pairs, LORA, SMALL.shape, "base", {})
    loaded = peft.PeftModel.from_pretrained(hf_model(0), tmp_path / "ours")
    np.testing.assert_array_equal(peft_logits(loaded, tokens), wanted)
    again, same = read_peft(epath.Path(tmp_path / "ours"), SMALL.shape)
    assert again == LORA
    jax.tree.map(np.testing.assert_array_equal, same, pairs)


def test_loss_and_gradients_of_both_factors_are_those_of_trl(tmp_path):
    """TRL's reference of an adapted policy is the model without its adapters; so is ours."""
    config = peft.LoraConfig(r=3, lora_alpha=6, target_modules=MODULES, task_type="CAUSAL_LM")
    options = COMMON | SIGMOID_SFT | {"beta": BETA, "precompute_ref_log_probs": False}
    trainer = trl.DPOTrainer(
        model=hf_model(0),
        args=trl.DPOConfig(output_dir=str(tmp_path), **options),
        train_dataset=hf_dataset(),
        processing_class=hf_tokenizer(),
        peft_config=config,
    )
    model = draw(trainer.model).train()
    (batch,) = trainer.get_train_dataloader()
    loss = trainer.compute_loss(model, batch)
    loss.backward()
    model.save_pretrained(tmp_path / "adapters")
    grads = {n: p.grad.numpy() for n, p in model.named_parameters() if p.grad is not None}

    _, pairs = read_peft(epath.Path(tmp_path / "adapters"), SMALL.shape)
    ours = make_config(rpo={"alpha": ALPHA, "beta": BETA, "nll_norm": "batch_tokens"})
    rows = pair_batch(records(), reference=False)
    score = jax.jit(lambda params, rows: target_logps(SMALL, params, rows, Projection(5)))
    rows["reference_logps"] = np.asarray(score(weights(0), rows))
    work = make_work(ours, NETWORK)
    compute = jax.jit(partial(compute_gradients, work.objective, 1))
    found, means = compute({"lora": pairs}, weights(0), work.hyper, rows)
    np.testing.assert_allclose(work.objective.loss(means, work.hyper), loss.item(), rtol=LOSS_RTOL)
    assert len(grads) == 2 * 2 * len(MODULES)
    write_peft(
        epath.Path(tmp_path / "grads"), jax.device_get(found["lora"]), LORA, SMALL.shape, "", {}
    )
    from safetensors.numpy import load_file

    for name, value in load_file(tmp_path / "grads/adapter_model.safetensors").items():
        wanted = grads[name.replace(".weight", ".default.weight")]
        norm = np.linalg.norm(wanted)
        assert norm > 0, name
        assert np.linalg.norm(value - wanted) < GRADIENT_RTOL * norm, name
