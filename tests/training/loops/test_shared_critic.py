"""A critic that is a head on the policy's trunk: one pass and one step for both, and a head that never leaves."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from rl_task import Run, weights_of
from safetensors import safe_open
from transformers import AutoModelForCausalLM

from rollouts.errors import UserError
from rollouts.inference import EmbeddedEngine
from rollouts.inference.weights import weights_checksum
from rollouts.models.critic import add_value_head
from rollouts.models.export import export_model
from rollouts.models.lora import LoRAConfig, add_lora
from rollouts.training import OptimizerConfig, PyTorchTrainingBackend, RLTrainingConfig, Sample, create_pytorch_backend
from rollouts.training.algorithms.policy_losses import PolicyLossConfig, make_policy_loss
from rollouts.training.algorithms.value import ValueLossConfig, make_shared_loss, make_value_loss
from rollouts.training.loops.rl_batches import collate_rl_step
from rollouts.training.loops.rl_loop import prepare_models
from rollouts.training.sft_losses import causal_lm_loss


def with_head(model: Any, seed: int | None = None) -> Any:
    add_value_head(model)
    if seed is not None:
        torch.manual_seed(seed)
        torch.nn.init.normal_(head_of(model))
    return model


def head_of(model: Any) -> torch.Tensor:
    return (model.get_base_model() if hasattr(model, "peft_config") else model).value_head.weight


def policy_of(model: Any, folder: Path | None = None, optimizer: str = "adamw", **more: Any) -> PyTorchTrainingBackend:
    config = OptimizerConfig(optimizer, lr=2e-3)  # type: ignore[arg-type]
    return create_pytorch_backend(with_head(model), checkpoint_dir=folder, optimizer=config, value_head_lr=1e-3, **more)


def two_samples() -> tuple[list[Sample], dict[str, list[np.ndarray]]]:
    samples = [
        Sample(tokens=[5, 9, 2, 7, 8], loss_mask=[0, 0, 1, 1, 1], advantages=[0, 0, 1.0, -0.5, 2.0], reward=1.0),
        Sample(tokens=[4, 3, 6], loss_mask=[0, 1, 1], advantages=[0, 0.3, -1.0], reward=0.0),
    ]
    values = [np.array([0.1, 0.2, -0.3], np.float32), np.array([0.0, 0.5], np.float32)]
    returns = [np.array([1.0, 0.9, 0.4], np.float32), np.array([-0.2, 0.0], np.float32)]
    return samples, {"values": values, "returns": returns}


@pytest.mark.parametrize("aggregation", ["token-mean", "seq-mean-token-mean"])
def test_its_gradient_is_that_of_both_losses_written_out(make_tiny_model, aggregation: str) -> None:
    model = with_head(make_tiny_model(), seed=1)
    plain = copy.deepcopy(model)
    policy = PolicyLossConfig("reinforce", aggregation=aggregation)
    loss = make_shared_loss(
        make_policy_loss(policy), make_value_loss(ValueLossConfig(None, policy.aggregate_by)), value_coef=0.25
    )
    backend = PyTorchTrainingBackend(model, lambda m: torch.optim.SGD(m.parameters(), lr=1.0), loss, max_grad_norm=None)
    samples, columns = two_samples()
    for tokens in (6, 100):  # a micro-batch each, and one for both
        batches, _ = collate_rl_step(samples, range(2), tokens, columns)
        assert len(batches) == (2 if tokens == 6 else 1)
        backend.model.load_state_dict(plain.state_dict())
        metrics = backend.forward_backward(batches).wait()
        backend.optim_step().wait()

        losses = []
        for sample, returns in zip(samples, columns["returns"], strict=True):
            ids, mask = torch.tensor([sample.tokens]), torch.tensor(sample.loss_mask[1:]) > 0
            hidden = plain.base_model(ids).last_hidden_state[0, :-1]
            log_probs = plain.lm_head(hidden).log_softmax(-1).gather(-1, ids[0, 1:, None])[:, 0]
            value_error = (hidden @ plain.value_head.weight[0])[mask] - torch.from_numpy(returns)
            advantages = torch.tensor(sample.advantages)[1:][mask]
            losses.append(-advantages * log_probs[mask] + 0.25 * 0.5 * value_error.square())
        by_token = aggregation == "token-mean"
        mean = torch.cat(losses).mean() if by_token else torch.stack([loss.mean() for loss in losses]).mean()
        plain.zero_grad()
        mean.backward()
        assert metrics["critic/value_error"] > 0
        for before, after in zip(plain.parameters(), backend.model.parameters(), strict=True):
            torch.testing.assert_close(before - before.grad, after, atol=2e-5, rtol=1e-4)


def test_ppo_learns_with_one_model(make_tiny_model, tiny_tokenizer) -> None:
    model = make_tiny_model()
    backend = policy_of(model)
    run = Run(model, tiny_tokenizer, backend=backend, rollouts={"n_samples_per_prompt": 1, "batch_size": 32})
    before = weights_of(backend)

    async def what_changed(step: int) -> dict[str, float]:
        now = backend.get_weights().wait()
        trunk = any(not torch.equal(now[name], weight) for name, weight in before.items())
        return {"trunk": float(trunk), "head": float(head_of(model).any())}

    config = RLTrainingConfig(num_steps=25, advantage="gae", mini_batches=2, num_epochs=2, value_steps=5, eval_every=1)
    history = run.train(config, critic=backend, evaluate=what_changed)
    assert [row["eval_trunk"] for row in history] == [0.0] * 5 + [1.0] * 20
    assert all(row["eval_head"] for row in history)
    rewards = [row["reward_mean"] for row in history]
    assert np.mean(rewards[-5:]) > np.mean(rewards[:5]) + 0.15
    errors = [row["critic/value_error"] for row in history]
    assert errors[0] > 0.3 and np.mean(errors[-5:]) < 0.2
    assert history[-1]["mismatch_kl"] < 1e-5


@pytest.mark.parametrize("kind", ["adamw", "muon", "bfloat16", "lora"])
def test_resume_is_bitwise(make_tiny_model, tiny_tokenizer, tmp_path: Path, kind: str) -> None:
    def train(folder: str, num_steps: int) -> tuple[list[dict[str, Any]], dict[str, torch.Tensor]]:
        model = add_lora(make_tiny_model(), LoRAConfig(r=4)) if kind == "lora" else make_tiny_model()
        backend = policy_of(
            model,
            tmp_path / folder,
            "muon" if kind == "muon" else "adamw",
            precision="bfloat16" if kind == "bfloat16" else "float32",
        )
        run = Run(model, tiny_tokenizer, backend=backend)
        config = RLTrainingConfig(
            num_steps=num_steps, advantage="gae", mini_batches=2, value_steps=2, checkpoint_every=2, keep_checkpoints=1
        )
        history = run.train(config, critic=backend)
        return history, {**weights_of(backend), "head": head_of(model).clone()}

    history, whole = train("whole", 6)
    train("parts", 2)
    train("parts", 4)
    rest, resumed = train("parts", 6)
    assert [row["step"] for row in rest] == [5, 6]
    for a, b in zip(history[4:], rest, strict=True):
        assert a["loss"] == b["loss"] and a["critic/value_loss"] == b["critic/value_loss"]
    assert whole["head"].any() and all(torch.equal(whole[name], resumed[name]) for name in whole)


def test_the_head_stays_with_the_trainer(make_tiny_model, tiny_tokenizer, tmp_path: Path) -> None:
    plain = make_tiny_model()
    model = with_head(copy.deepcopy(plain), seed=2)
    backend = create_pytorch_backend(model, tiny_tokenizer, checkpoint_dir=tmp_path / "run")
    assert backend.get_weights().wait().keys() == plain.state_dict().keys()
    assert weights_checksum(model) == weights_checksum(plain)
    step = backend.save_checkpoint(1).wait()
    export_model(model, tiny_tokenizer, tmp_path / "out")
    for folder in (step, tmp_path / "out"):
        _, info = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
        assert not info["unexpected_keys"] and not info["missing_keys"]
    assert not (tmp_path / "out" / "value_head.safetensors").exists()
    with safe_open(step / "value_head.safetensors", "pt") as file:
        assert torch.equal(file.get_tensor("value_head.weight"), head_of(model))

    before = head_of(model).clone()
    backend.load_weights(backend.get_weights().wait()).wait()
    assert torch.equal(head_of(model), before)
    with EmbeddedEngine(copy.deepcopy(model), tiny_tokenizer, max_length=32) as engine:  # a copy that has it, too
        assert engine.update_weights(backend.get_weights().wait(), 7).wait() == 7


def test_it_is_one_model_to_commit(make_tiny_model) -> None:
    backend = policy_of(make_tiny_model())
    models = prepare_models(backend, None, backend, None, RLTrainingConfig(num_steps=1, advantage="gae"))
    assert models.has_value_head and models.companions == []


def test_what_does_not_fit_is_named(make_tiny_model, tiny_tokenizer, tmp_path: Path) -> None:
    backend = create_pytorch_backend(make_tiny_model())
    run = Run(backend.model, tiny_tokenizer, backend=backend)
    with pytest.raises(UserError, match="no value head"):
        run.train(RLTrainingConfig(num_steps=1, advantage="gae"), critic=backend)
    shared = policy_of(make_tiny_model(), tmp_path)
    run = Run(shared.model, tiny_tokenizer, backend=shared)
    with pytest.raises(UserError, match="policy loss by name"):
        run.train(RLTrainingConfig(num_steps=1, advantage="gae", loss=causal_lm_loss), critic=shared)
    model = make_tiny_model()
    model.config.final_logit_softcapping = 30.0
    with pytest.raises(UserError, match="critic of its own"):
        policy_of(model)
    plain = create_pytorch_backend(make_tiny_model(), checkpoint_dir=tmp_path / "plain")
    step = plain.save_checkpoint(1).wait()
    with pytest.raises(UserError, match="value_head"):
        shared.load_checkpoint(step).wait()
