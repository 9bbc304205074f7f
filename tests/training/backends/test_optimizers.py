"""Schedules, which parameter goes to which optimizer, and moments that survive as plain tensors."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from transformers import AutoModelForCausalLM, GPTNeoXConfig, PreTrainedModel

from rollouts.errors import UserError
from rollouts.models.critic import add_value_head
from rollouts.training.backends.optimizers import (
    CombinedOptimizer,
    OptimizerConfig,
    ScheduleConfig,
    create_adamw_optimizer,
    create_optimizer,
    create_warmup_cosine_scheduler,
    load_optimizer_state,
    make_schedule,
    optimizer_name,
    optimizer_state,
    trainable_parameters,
)

NAMES = ("constant", "linear", "cosine", "wsd")


@pytest.mark.parametrize("name", NAMES)
def test_the_whole_curve(name: str) -> None:
    n, warmup, low = 101, 20, 0.2
    factor = make_schedule(ScheduleConfig(name, warmup_steps=warmup, start_ratio=0.5, min_lr_ratio=low), n)
    assert [factor(s) for s in (0, 10, 20)] == pytest.approx([0.5, 0.75, 1.0])
    halfway = {
        "constant": 1.0,
        "linear": low + (1 - low) * 0.5,
        "cosine": low + (1 - low) * 0.5 * (1 + math.cos(math.pi * 0.5)),
        "wsd": 1.0,
    }
    assert factor(60) == pytest.approx(halfway[name])
    assert factor(n - 1) == pytest.approx(1.0 if name == "constant" else low)
    assert factor(10 * n) == factor(n - 1)  # a run continued past its end


def test_wsd_is_stable_and_then_falls_in_a_line() -> None:
    factor = make_schedule(ScheduleConfig("wsd", warmup_steps=0, min_lr_ratio=0.0, decay_ratio=0.25), 100)
    assert {factor(s) for s in range(76)} == {1.0}
    drops = [factor(s) - factor(s + 1) for s in range(75, 99)]
    assert drops == pytest.approx([1 / 24] * 24)


@given(
    name=st.sampled_from(NAMES[1:]),
    num_steps=st.integers(2, 300),
    warmup=st.floats(0, 0.5),
    low=st.floats(0, 1),
    decay=st.floats(0.1, 1),
)
def test_every_decay_ends_at_its_floor(name: str, num_steps: int, warmup: float, low: float, decay: float) -> None:
    config = ScheduleConfig(name, warmup_ratio=warmup, min_lr_ratio=low, decay_ratio=decay, start_ratio=0.0)
    values = [make_schedule(config, num_steps)(s) for s in range(num_steps)]
    assert all(0 <= v <= 1 + 1e-12 for v in values)
    if round(warmup * num_steps) < num_steps - 1 and (name != "wsd" or round((1 - decay) * num_steps) < num_steps - 1):
        assert values[-1] == pytest.approx(low)
    falling = values[round(warmup * num_steps) :]
    assert all(a >= b - 1e-12 for a, b in itertools.pairwise(falling))


def test_the_short_form_is_the_cosine() -> None:
    a = create_warmup_cosine_scheduler(50, warmup_ratio=0.2, min_lr_ratio=0.05, start_ratio=0.0)
    b = make_schedule(ScheduleConfig("cosine", warmup_ratio=0.2, min_lr_ratio=0.05, start_ratio=0.0), 50)
    assert [a(s) for s in range(50)] == [b(s) for s in range(50)]
    assert (a(0), a(10), a(49)) == pytest.approx((0.0, 1.0, 0.05))


def test_vectors_do_not_decay(make_tiny_model: Callable[..., PreTrainedModel]) -> None:
    model = make_tiny_model()
    optimizer = create_adamw_optimizer(model, weight_decay=0.3)
    decays = {id(p): g["weight_decay"] for g in optimizer.param_groups for p in g["params"]}
    assert len(decays) == len(list(model.parameters()))
    for name, parameter in model.named_parameters():
        assert decays[id(parameter)] == (0.0 if "norm" in name else 0.3), name


@pytest.mark.parametrize("tied", [True, False])
def test_muon_gets_the_hidden_matrices_and_nothing_else(
    make_tiny_model: Callable[..., PreTrainedModel], tied: bool
) -> None:
    model = make_tiny_model(tie_embeddings=tied)
    optimizer = create_optimizer(model, OptimizerConfig("muon", lr=1e-3, muon_lr=0.03, weight_decay=0.1))
    assert isinstance(optimizer, CombinedOptimizer) and optimizer_name(optimizer) == "Muon+AdamW"
    names = {id(p): n for n, p in model.named_parameters()}
    muon, adamw = ({names[id(p)] for g in o.param_groups for p in g["params"]} for o in optimizer.optimizers)
    assert muon == {n for n, p in model.named_parameters() if ".layers." in n and p.ndim == 2}
    assert adamw == set(names.values()) - muon
    assert {g["lr"] for g in optimizer.optimizers[0].param_groups} == {0.03}
    assert {g["lr"] for g in optimizer.optimizers[1].param_groups} == {1e-3}


@pytest.mark.parametrize("name", ["adamw", "muon"])
def test_a_value_head_has_a_rate_of_its_own_and_does_not_decay(
    make_tiny_model: Callable[..., PreTrainedModel], name: str
) -> None:
    model = make_tiny_model()
    add_value_head(model)
    config = OptimizerConfig(name, lr=1e-3, weight_decay=0.1)
    for head_lr in (0.02, None):
        optimizer = create_optimizer(model, config, head_lr)
        [group] = [g for g in optimizer.param_groups if any(p is model.value_head.weight for p in g["params"])]
        assert len(group["params"]) == 1 and group["weight_decay"] == 0.0 and group["lr"] == (head_lr or 1e-3)
        inner = optimizer.optimizers[-1] if name == "muon" else optimizer
        assert isinstance(inner, torch.optim.AdamW) and any(g is group for g in inner.param_groups)


def test_muon_knows_the_output_layer_by_its_place_not_its_name() -> None:
    config = GPTNeoXConfig(
        vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=2
    )
    model = AutoModelForCausalLM.from_config(config)
    optimizer = create_optimizer(model, OptimizerConfig("muon"))
    muon = {id(p) for g in optimizer.optimizers[0].param_groups for p in g["params"]}
    assert id(model.get_output_embeddings().weight) not in muon
    assert id(model.get_input_embeddings().weight) not in muon


def test_frozen_parameters_are_in_no_optimizer(make_tiny_model: Callable[..., PreTrainedModel]) -> None:
    model = make_tiny_model()
    model.get_input_embeddings().weight.requires_grad_(False)
    for name in ("adamw", "muon"):
        optimizer = create_optimizer(model, OptimizerConfig(name))
        chosen = {id(p) for g in optimizer.param_groups for p in g["params"]}
        assert chosen == {id(p) for p in model.parameters() if p.requires_grad}


def test_bad_requests_say_what_to_do(make_tiny_model: Callable[..., PreTrainedModel]) -> None:
    model = make_tiny_model()
    with pytest.raises(UserError, match="'sgd' is not known: use adamw or muon"):
        create_optimizer(model, OptimizerConfig("sgd"))  # type: ignore[arg-type]
    model.requires_grad_(False)
    with pytest.raises(UserError, match="no trainable parameter"):
        create_optimizer(model, OptimizerConfig())


class Net(nn.Module):
    def __init__(self, seed: int) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.table, self.hidden, self.norm = nn.Embedding(5, 8), nn.Linear(8, 8), nn.LayerNorm(8)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return self.norm(self.hidden(self.table(ids))).pow(3).sum()


MAKERS: dict[str, Callable[[nn.Module], torch.optim.Optimizer | CombinedOptimizer]] = {
    "adamw": lambda m: create_optimizer(m, OptimizerConfig(lr=0.1, weight_decay=0.1)),
    "muon": lambda m: create_optimizer(m, OptimizerConfig("muon", lr=0.1)),
    "sgd": lambda m: torch.optim.SGD(m.parameters(), lr=1e-3, momentum=0.9),
    "plain sgd": lambda m: torch.optim.SGD(m.parameters(), lr=1e-3),
}


def learn(net: nn.Module, optimizer: torch.optim.Optimizer | CombinedOptimizer, steps: range) -> None:
    for step in steps:
        net.zero_grad()
        net(torch.arange(5).roll(step)[:3]).backward()
        optimizer.step()


@pytest.mark.parametrize("kind", MAKERS)
def test_moments_survive_bit_for_bit(kind: str) -> None:
    net = Net(0)
    optimizer = MAKERS[kind](net)
    learn(net, optimizer, range(4))
    weights = {n: p.detach().clone() for n, p in net.named_parameters()}
    state = dict(optimizer_state(optimizer, {id(p): n for n, p in net.named_parameters()}))
    state = {key: value.clone() for key, value in state.items()}
    learn(net, optimizer, range(4, 8))

    other = Net(1)
    other.load_state_dict(weights)
    resumed = MAKERS[kind](other)
    load_optimizer_state(resumed, dict(trainable_parameters(other)), state)
    learn(other, resumed, range(4, 8))
    for (name, a), (_, b) in zip(net.named_parameters(), other.named_parameters(), strict=True):
        assert torch.equal(a, b), name


def test_moments_of_another_model_are_refused() -> None:
    net = Net(0)
    optimizer = MAKERS["adamw"](net)
    learn(net, optimizer, range(1))
    state = dict(optimizer_state(optimizer, {id(p): n for n, p in net.named_parameters()}))
    parameters = dict(trainable_parameters(net))
    with pytest.raises(UserError, match=r"moments of 'head\.weight', which does not train here"):
        load_optimizer_state(optimizer, parameters, state | {"head.weight#exp_avg": torch.zeros(1)})


@pytest.mark.parametrize("fused", [True, False])
def test_a_fused_optimizer_finds_its_step_count_on_the_device(fused: bool) -> None:
    """As on a GPU, where a fused kernel that is handed a step count on the host reads memory that is not its own."""
    parameter = nn.Parameter(torch.zeros(3, device="meta"))
    optimizer = torch.optim.AdamW([parameter])
    optimizer.param_groups[0]["fused"] = fused
    moments = {"w#step": torch.tensor(4.0), "w#exp_avg": torch.zeros(3, device="meta")}
    load_optimizer_state(optimizer, {"w": parameter}, moments)
    assert optimizer.state[parameter]["step"].device.type == ("meta" if fused else "cpu")
