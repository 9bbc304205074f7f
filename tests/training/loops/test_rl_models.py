"""The models beside the policy: critic (PPO), process rewards (PRIME), greedy baseline (ReMax), references for KL."""

from __future__ import annotations

import asyncio
import copy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from rl_task import Run, Silent, share_of_bytes, weights_of

from rollouts.errors import UserError
from rollouts.inference import SamplingParams
from rollouts.models.critic import make_critic
from rollouts.models.lora import LoRAConfig, add_lora
from rollouts.training import (
    EngineGenerate,
    OptimizerConfig,
    PyTorchTrainingBackend,
    RLTrainingConfig,
    Sample,
    create_pytorch_backend,
    run_rl_training,
)
from rollouts.training.algorithms.reward_model import make_prime_loss
from rollouts.training.algorithms.value import make_value_loss
from rollouts.training.backends.reference import BaseModel, FrozenModel
from rollouts.training.loops.rl_batches import prepare_rl_batch
from rollouts.training.loops.rl_loop import prepare_models
from rollouts.training.loops.rl_metrics import Stopwatch
from rollouts.training.loops.rl_step import ProcessRewards, learn_from_rollouts
from rollouts.training.rollout_gen.greedy import GreedyBaselines


def critic_of(model: torch.nn.Module, folder: Path | None = None, lr: float = 3e-3) -> Any:
    return create_pytorch_backend(
        make_critic(model), checkpoint_dir=folder, optimizer=OptimizerConfig(lr=lr), loss_fn=make_value_loss()
    )


def process_of(model: torch.nn.Module, folder: Path | None = None) -> ProcessRewards:
    start = copy.deepcopy(model)
    backend = create_pytorch_backend(
        start, checkpoint_dir=folder, optimizer=OptimizerConfig(lr=1e-3), loss_fn=make_prime_loss(0.05)
    )
    return ProcessRewards(backend, FrozenModel(model), 0.05)


def test_ppo_learns_and_its_critic_comes_to_expect_the_reward(make_tiny_model, tiny_tokenizer) -> None:
    rollouts = {"n_samples_per_prompt": 1, "batch_size": 32}
    run = Run(make_tiny_model(), tiny_tokenizer, rollouts=rollouts, lr=2e-3)
    before = weights_of(run.backend)

    async def unchanged_at_first(step: int) -> dict[str, float]:
        now = run.backend.get_weights().wait()
        return {"changed": float(any(not torch.equal(now[name], w) for name, w in before.items()))}

    config = RLTrainingConfig(num_steps=25, advantage="gae", mini_batches=2, num_epochs=2, value_steps=5, eval_every=1)
    history = run.train(config, critic=critic_of(make_tiny_model()), evaluate=unchanged_at_first)
    assert [row["eval_changed"] for row in history] == [0.0] * 5 + [1.0] * 20
    rewards = [row["reward_mean"] for row in history]
    assert np.mean(rewards[-5:]) > np.mean(rewards[:5]) + 0.15
    # A critic that expected nothing would be off by the reward; one that knows its mean, by about its spread.
    errors = [row["critic/value_error"] for row in history]
    assert errors[0] > 0.3 and np.mean(errors[-5:]) < 0.2
    assert history[-1]["critic/return_mean"] == pytest.approx(rewards[-1], abs=0.05)


def test_a_critic_reads_the_state_before_each_token(make_tiny_model) -> None:
    """Its value at token t is the head on the policy's own hidden state at t - 1."""
    model = make_tiny_model()
    critic = critic_of(model)
    head = critic.model.get_output_embeddings()
    assert not head.weight.any()
    torch.nn.init.normal_(head.weight)
    samples = [Sample(tokens=[5, 9, 2, 7, 8], loss_mask=[0, 0, 1, 1, 0]), Sample(tokens=[4, 3], loss_mask=[0, 1])]
    [values] = critic.compute_values(prepare_rl_batch(samples)).wait()
    with torch.no_grad():
        hidden = [model.base_model(torch.tensor([s.tokens])).last_hidden_state[0] for s in samples]
    expected = torch.cat([hidden[0][1:3], hidden[1][:1]]) @ head.weight[0]
    torch.testing.assert_close(values, expected, atol=1e-5, rtol=1e-5)


@pytest.mark.usefixtures("compiled_step")
@pytest.mark.parametrize("kind", ["critic", "process"])
def test_resume_is_bitwise_with_companions(make_tiny_model, tiny_tokenizer, tmp_path: Path, kind: str) -> None:
    def train(folder: str, num_steps: int) -> tuple[list[dict[str, Any]], list[dict[str, torch.Tensor]]]:
        root = tmp_path / folder
        run = Run(make_tiny_model(), tiny_tokenizer, root / "policy")
        if kind == "critic":
            more: dict[str, Any] = {"critic": critic_of(make_tiny_model(), root / "critic")}
            backend = more["critic"]
        else:
            more = {"process": process_of(make_tiny_model(), root / "process")}
            backend = more["process"].backend
        config = RLTrainingConfig(
            num_steps=num_steps,
            advantage="gae" if kind == "critic" else "prime",
            mini_batches=2,
            checkpoint_every=2,
            keep_checkpoints=1,
        )
        return run.train(config, **more), [weights_of(run.backend), weights_of(backend)]

    history, whole = train("whole", 6)
    train("parts", 4)
    rest, resumed = train("parts", 6)
    assert [row["step"] for row in rest] == [5, 6]
    for a, b in zip(history[4:], rest, strict=True):
        assert a["loss"] == b["loss"] and a["grad_norm"] == b["grad_norm"]
    for a, b in zip(whole, resumed, strict=True):
        assert all(torch.equal(a[name], b[name]) for name in a)


def test_prime_learns_and_its_process_model_tells_right_from_wrong(make_tiny_model, tiny_tokenizer) -> None:
    async def mostly_bytes(sample: Any) -> float:
        return float(await share_of_bytes(sample) > 0.6)

    run = Run(make_tiny_model(), tiny_tokenizer, rollouts={"reward_fn": mostly_bytes, "n_samples_per_prompt": 8})
    history = run.train(RLTrainingConfig(num_steps=25, advantage="prime"), process=process_of(make_tiny_model()))
    rewards = [row["reward_mean"] for row in history]
    assert np.mean(rewards[-5:]) > np.mean(rewards[:5]) + 0.15
    assert history[-1]["process/loss"] < history[0]["process/loss"]


def test_remax_takes_the_greedy_reward_for_its_baseline(make_tiny_model, tiny_tokenizer) -> None:
    run = Run(make_tiny_model(), tiny_tokenizer, rollouts={"n_samples_per_prompt": 2})
    greedy = EngineGenerate(run.engine, tiny_tokenizer, SamplingParams(max_tokens=8, temperature=0.0))
    kept: list[Any] = []

    class Log:
        def log(self, step: int, samples: list[Any]) -> None:
            kept.extend(samples)

    source = GreedyBaselines(run.manager, greedy, share_of_bytes)
    config = RLTrainingConfig(num_steps=1, advantage="remax", loss={"name": "reinforce"})
    reference = make_tiny_model().eval()
    with run.engine:
        asyncio.run(run_rl_training(run.backend, run.buffer, source, [run.engine], config, Silent(), rollout_log=Log()))
    assert len(kept) == 8
    for sample in kept[::2]:
        start = sample.loss_mask.index(1)
        tokens = list(sample.tokens[:start])
        end = {reference.generation_config.eos_token_id}
        while len(tokens) < start + 8 and (len(tokens) == start or tokens[-1] not in end):
            with torch.no_grad():
                tokens.append(int(reference(torch.tensor([tokens])).logits[0, -1].argmax()))
        baseline = sum(token < 256 for token in tokens[start:]) / len(tokens[start:])
        assert sample.metadata["greedy_reward"] == pytest.approx(baseline)
        assert sample.advantages[start] == pytest.approx(sample.reward - baseline, abs=1e-6)


def test_references_agree_and_hold_the_policy_back(make_tiny_model, tiny_tokenizer) -> None:
    def lora() -> torch.nn.Module:
        return add_lora(make_tiny_model(), LoRAConfig(r=4))

    def moved(kl_coef: float, kind: str, kl_in_reward: float = 0.0) -> list[float]:
        run = Run(lora(), tiny_tokenizer, lr=1e-2)
        reference = BaseModel(run.backend) if kind == "base" else FrozenModel(make_tiny_model())
        config = RLTrainingConfig(num_steps=20, loss={"kl_coef": kl_coef}, kl_in_reward=kl_in_reward)
        return [row["kl_ref"] for row in run.train(config, reference=reference)]

    free, frozen = moved(0.0, "base"), moved(0.0, "frozen")
    assert free[0] == pytest.approx(0, abs=1e-6) and free[-1] > 1e-3
    assert free == pytest.approx(frozen, rel=1e-2, abs=1e-6)
    held, paid = moved(10.0, "base"), moved(0.0, "frozen", kl_in_reward=10.0)
    assert np.mean(held[-5:]) < 0.8 * np.mean(free[-5:]), (free, held)
    assert np.mean(paid[-5:]) < 0.8 * np.mean(free[-5:]), (free, paid)


def full_kl_by_hand(
    policy: torch.nn.Module, reference: torch.nn.Module, samples: list[Sample], temperature: float
) -> torch.Tensor:
    """Mean over learned tokens of sum_v p (log p - log q), one sample at a time and through autograd."""
    per_token = []
    for sample in samples:
        ids = torch.tensor([sample.tokens])
        log_p = torch.log_softmax(policy(ids).logits[0, :-1] / temperature, -1)
        with torch.no_grad():
            log_q = torch.log_softmax(reference(ids).logits[0, :-1] / temperature, -1)
        learned = torch.tensor(sample.loss_mask[1:]) > 0
        per_token.append((log_p.exp() * (log_p - log_q)).sum(-1)[learned])
    return torch.cat(per_token).mean()


def sgd(model: torch.nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1.0)


@pytest.mark.parametrize("max_tokens", [1000, 20])
@pytest.mark.parametrize("kind", ["frozen", "base"])
@pytest.mark.parametrize("kl", ["full", "full+"])
def test_full_kl_is_the_sum_over_the_vocabulary(make_tiny_model, kl: str, kind: str, max_tokens: int) -> None:
    """One step from rewards that all agree, so that nothing but the KL moves the policy; however it is divided."""
    reference = make_tiny_model().eval()
    policy = copy.deepcopy(reference)
    if kind == "base":
        policy = add_lora(policy, LoRAConfig(r=4)).eval()
    torch.manual_seed(1)
    for parameter in policy.parameters():
        parameter.data += 0.03 * torch.randn_like(parameter) * parameter.requires_grad
    rng = np.random.default_rng(0)
    samples = []
    for i, (prompt, response) in enumerate([(3, 5), (3, 2), (4, 6), (4, 1), (4, 3)]):
        shared = np.random.default_rng(prompt).integers(5, 200, prompt).tolist()  # a group's prompt
        tokens = shared + rng.integers(5, 200, response).tolist()
        mask = [0.0] * prompt + [1.0] * response
        samples.append(Sample(tokens=tokens, loss_mask=mask, reward=0.5, group_id=str(prompt), id=str(i)))

    by_hand = copy.deepcopy(policy)
    loss = full_kl_by_hand(by_hand, reference, samples, 0.7)
    if kl == "full":
        (2.0 * loss).backward()
        with torch.no_grad():
            for parameter in by_hand.parameters():
                if parameter.grad is not None:
                    parameter -= parameter.grad

    backend = PyTorchTrainingBackend(policy, sgd, max_grad_norm=None)
    config = RLTrainingConfig(
        loss={"kl": kl, "kl_coef": 2.0}, temperature=0.7, max_tokens_per_micro_batch=max_tokens, num_steps=1
    )
    given = BaseModel(backend) if kind == "base" else FrozenModel(reference)
    models = prepare_models(backend, given, None, None, config)
    metrics = asyncio.run(learn_from_rollouts(models, samples, config, 0, Stopwatch()))
    assert metrics["kl_ref"] == pytest.approx(loss.item(), rel=1e-4) and loss > 1e-3
    if kl == "full":
        for (name, ours), theirs in zip(policy.named_parameters(), by_hand.parameters(), strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-6, msg=name)


def test_full_kl_holds_the_policy_back(make_tiny_model, tiny_tokenizer) -> None:
    def moved(kl_coef: float) -> list[float]:
        run = Run(make_tiny_model(), tiny_tokenizer)
        config = RLTrainingConfig(num_steps=12, mini_batches=2, loss={"kl_coef": kl_coef, "kl": "full"})
        return [row["kl_ref"] for row in run.train(config, reference=FrozenModel(make_tiny_model()))]

    free, held = moved(0.0), moved(10.0)
    assert free[0] >= -1e-6 and free[-1] > 1e-3
    assert np.mean(held[-5:]) < 0.8 * np.mean(free[-5:]), (free, held)


class LogProbsOnly:
    """A reference that knows no more than log-probs."""

    def compute_log_probs(self, batch: Any, temperature: float = 1.0) -> Any:
        raise AssertionError("never asked")


def test_what_is_missing_is_named(make_tiny_model, tiny_tokenizer, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="adapter"):
        BaseModel(create_pytorch_backend(make_tiny_model()))
    for config, more, message in (
        (RLTrainingConfig(num_steps=1, advantage="gae"), {}, "values"),
        (RLTrainingConfig(num_steps=1, advantage="remax"), {}, "greedy"),
        (RLTrainingConfig(num_steps=1, loss={"kl_coef": 0.1}), {}, "reference"),
        (RLTrainingConfig(num_steps=1, advantage="gae"), {"critic": critic_of(make_tiny_model())}, "checkpoint_dir"),
        (RLTrainingConfig(num_steps=1, loss={"kl": "full"}), {"reference": LogProbsOnly()}, "FrozenModel"),
    ):
        with pytest.raises(UserError, match=message):
            Run(make_tiny_model(), tiny_tokenizer, tmp_path).train(config, **more)
