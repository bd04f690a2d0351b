"""Muon's steps: the polynomial of Newton-Schulz, momentum, decay, and DeepSpeed's implementation beside ours."""

import copy

import pytest
import torch
import torch._dynamo
from hypothesis import given
from hypothesis import strategies as st
from torch._dynamo.utils import counters

from megabert.config.recipe import OptimizerConfig
from megabert.training.distributed.deepspeed_compat import skip_compiler_of_muon_on_cpus
from megabert.training.updates import muon
from megabert.training.updates.muon import COEFFICIENTS, ITERATIONS, Muon, orthogonalize
from megabert.training.updates.optimizers import make_muon, muon_matrices, parameter_groups, peak_lr
from tests.model.helpers.small import small_model

CONFIG = OptimizerConfig(name="muon", muon_lr=0.02, lr=1e-3, weight_decay=0.1)
SETTINGS = {"lr": CONFIG.lr, "betas": (0.9, 0.98), "eps": 1e-6, "weight_decay": 0.0}


@pytest.fixture
def model():
    return small_model().float()


def optimizer_of(model: torch.nn.Module, make) -> torch.optim.Optimizer:
    optimizer = make(parameter_groups(model, CONFIG), **SETTINGS)
    for group in optimizer.param_groups:
        group["lr"] = peak_lr(group, CONFIG)
    return optimizer


def take_steps(model: torch.nn.Module, optimizer: torch.optim.Optimizer, seeds) -> None:
    for seed in seeds:
        generator = torch.Generator().manual_seed(seed)
        for parameter in model.parameters():
            parameter.grad = torch.randn(parameter.shape, generator=generator)
        optimizer.step()


@given(rows=st.integers(1, 12), columns=st.integers(1, 12), count=st.integers(1, 3), seed=st.integers(0, 99))
def test_the_singular_values_go_through_the_polynomial(rows, columns, count, seed):
    matrices = torch.randn(count, rows, columns, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    found = orthogonalize(matrices, torch.float64)
    left, values, right = torch.linalg.svd(matrices, full_matrices=False)
    values = values / (values.norm(dim=1, keepdim=True) + 1e-7)
    a, b, c = COEFFICIENTS
    for _ in range(ITERATIONS):
        values = a * values + b * values**3 + c * values**5
    torch.testing.assert_close(found, left * values[:, None] @ right, rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("make", [Muon, make_muon])
def test_matrices_get_orthogonal_steps_and_the_rest_adams(model, make):
    """Tall matrices' steps are longer by sqrt(rows / columns)."""
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    optimizer = optimizer_of(model, make)
    for group in optimizer.param_groups:
        group["weight_decay"] = 0.0
    with torch._dynamo.config.patch(disable=True):
        take_steps(model, optimizer, [4])
    matrices = muon_matrices(model)
    for name, parameter in model.named_parameters():
        change = parameter.detach() - before[name]
        if parameter in matrices:
            values = torch.linalg.svdvals(change) / (0.02 * max(1.0, change.shape[0] / change.shape[1]) ** 0.5)
            assert 0.5 < values.min(), name
            assert values.max() < 1.4, name
        else:
            # Adam's first step.
            assert change.abs().median() == pytest.approx(1e-3, rel=0.02), name


def test_deepspeeds_muon_takes_the_same_steps_in_bf16(model, monkeypatch):
    """With momentum and weight decay. Each orthogonalized matrix differs by the rounding of bf16."""
    monkeypatch.setattr(muon, "has_fast_bf16", lambda device: True)
    other = copy.deepcopy(model)
    start = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    with torch._dynamo.config.patch(disable=True):
        take_steps(model, optimizer_of(model, Muon), range(5))
        take_steps(other, optimizer_of(other, make_muon), range(5))
    matrices = muon_matrices(model)
    for (name, ours), theirs in zip(model.named_parameters(), other.parameters(), strict=True):
        if ours in matrices:
            assert (ours - theirs).norm() < 0.05 * (ours - start[name]).norm(), name
        else:
            assert torch.equal(ours, theirs), name


def test_a_loaded_state_continues_bitwise(model):
    other = copy.deepcopy(model)
    optimizer = optimizer_of(model, Muon)
    take_steps(model, optimizer, range(2))
    middle, state = copy.deepcopy(model.state_dict()), copy.deepcopy(optimizer.state_dict())
    take_steps(model, optimizer, range(2, 4))
    other.load_state_dict(middle)
    again = optimizer_of(other, Muon)
    again.load_state_dict(state)
    take_steps(other, again, range(2, 4))
    for (name, ours), theirs in zip(model.named_parameters(), other.parameters(), strict=True):
        assert torch.equal(ours, theirs), name


def test_what_has_no_gradient_stays(model):
    optimizer = optimizer_of(model, Muon)
    (*_, last) = muon_matrices(model)
    before = last.detach().clone()
    for parameter in model.parameters():
        parameter.grad = None if parameter is last else torch.ones_like(parameter)
    optimizer.step()
    assert torch.equal(last, before)
    assert last not in optimizer.state


def test_deepspeeds_muon_on_a_cpu_compiles_nothing(model):
    skip_compiler_of_muon_on_cpus()
    torch._dynamo.reset()
    counters.clear()
    take_steps(model, optimizer_of(model, make_muon), [4])
    assert not counters["frames"]
