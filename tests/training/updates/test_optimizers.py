"""Parameter groups, weight decay, StableAdamW, and Muon in runs at every ZeRO stage."""

import itertools
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from megabert.config.ds_config import ResolvedDsConfig
from megabert.config.recipe import OptimizerConfig
from megabert.convert.deepspeed_checkpoint import read_checkpoint
from megabert.training.run_schedule import lr_factor
from megabert.training.telemetry.reporter import read_metrics
from megabert.training.updates.optimizers import (
    Partition,
    StableAdamW,
    muon_matrices,
    parameter_groups,
)
from megabert.training.updates.unsupported_optimizers import why_not_optimizer
from tests.helpers.cases import cases
from tests.helpers.recipes import read_recipe
from tests.helpers.runs import Corpus, ds_config_in, finish_ranks, patched, pretrain_command, start_ranks
from tests.model.helpers.small import small_model

SETTINGS = {"lr": 0.1, "betas": (0.9, 0.95), "eps": 1e-6, "weight_decay": 0.01}


def names_of(group: dict, model: torch.nn.Module) -> set[str]:
    names = {parameter: name for name, parameter in model.named_parameters()}
    return {names[parameter] for parameter in group["params"]}


def test_every_parameter_lands_in_one_group():
    model = small_model()
    decaying, rest = parameter_groups(model, OptimizerConfig(weight_decay=0.3))
    assert (decaying["weight_decay"], rest["weight_decay"]) == (0.3, 0.0)
    assert all(p.dim() > 1 for p in decaying["params"])
    assert all(p.dim() == 1 for p in rest["params"])
    (whole,) = parameter_groups(model, OptimizerConfig(decay_norms_and_biases=True))
    assert names_of(whole, model) == names_of(decaying, model) | names_of(rest, model)
    assert len(whole["params"]) == len(list(model.parameters()))


def test_muon_gets_the_matrices_of_linear_maps_and_no_other():
    model = small_model()
    muon, decaying, rest = parameter_groups(model, OptimizerConfig(name="muon"))
    layer = ("attention.qkv", "attention.out", "mlp.up", "mlp.down")
    expected = {f"bert.encoder.layers.{i}.{name}.weight" for i in range(2) for name in layer}
    assert names_of(muon, model) == expected | {"transform.dense.weight"}
    assert muon_matrices(model) == set(muon["params"])
    assert names_of(decaying, model) == {f"bert.embeddings.{name}_embeddings.weight" for name in ("word", "token_type")}
    assert not any(p.dim() > 1 for p in rest["params"])


def gradients(steps: int) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(3)
    return [torch.randn(4, 3, generator=generator, dtype=torch.float64) * 10.0**i for i in range(steps)]


def stepped(weight: torch.Tensor, steps: int) -> torch.Tensor:
    parameter = torch.nn.Parameter(weight.clone())
    optimizer = StableAdamW([{"params": [parameter]}], **SETTINGS)
    for grad in gradients(steps):
        parameter.grad = grad
        optimizer.step()
    return parameter.detach()


def test_stable_adamw_takes_the_steps_of_the_paper():
    weight = torch.linspace(-1, 1, 12, dtype=torch.float64).view(4, 3)
    expected, m, v = weight.clone(), torch.zeros_like(weight), torch.zeros_like(weight)
    shortened = 0
    for t, grad in enumerate(gradients(3), start=1):
        first, second = (b * (1 - b ** (t - 1)) / (1 - b**t) for b in SETTINGS["betas"])
        m, v = first * m + (1 - first) * grad, second * v + (1 - second) * grad**2
        rms = float((grad**2 / v.clamp(min=SETTINGS["eps"] ** 2)).mean() ** 0.5)
        shortened += rms > 1.001
        lr = SETTINGS["lr"] / max(1.0, rms)
        expected = expected - lr * SETTINGS["weight_decay"] * expected - lr * m / (v**0.5 + SETTINGS["eps"])
    assert shortened
    torch.testing.assert_close(stepped(weight, 3), expected, rtol=1e-10, atol=1e-12)


def step_part_by_part(
    weights: torch.Tensor, grad: torch.Tensor, moments: torch.Tensor, step: int, parts: list, numels: list
) -> None:
    """Take a step in place, one part after the other. moments: (2, ...), of the weights' shape."""
    average, square = moments
    first, second = (beta * (1 - beta ** (step - 1)) / (1 - beta**step) for beta in SETTINGS["betas"])
    average.lerp_(grad, 1 - first)
    square.mul_(second).addcmul_(grad, grad, value=1 - second)
    ratios = (grad[part].square() / square[part].clamp(min=SETTINGS["eps"] ** 2) for part in parts)
    means = torch.stack([ratio.sum() / numel for ratio, numel in zip(ratios, numels, strict=True)])
    if len(parts) > 1:
        torch.distributed.all_reduce(means)
    for part, lr in zip(parts, SETTINGS["lr"] / means.sqrt().clamp(min=1), strict=True):
        weights[part] *= 1 - lr * SETTINGS["weight_decay"]
        weights[part] -= average[part] / square[part].sqrt().add(SETTINGS["eps"]) * lr


class CountCalls(TorchDispatchMode):
    """Counts operations that compute something."""

    calls = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.calls += func.overloadpacket.__name__ not in ("detach", "unbind", "_local_scalar_dense")
        return func(*args, **(kwargs or {}))


NUMELS = [35, 1, 33, 24, 301]


@pytest.mark.parametrize("begin", [None, 0, 20, 34, 36, 68, 380, 394])
def test_stable_adamw_steps_all_parts_at_once_as_one_after_the_other(monkeypatch, begin):
    """Bitwise. Of whole parameters, and of a partition of 32 numbers, which ends with padding or is nothing else."""
    generator = torch.Generator().manual_seed(5)
    monkeypatch.setattr(torch.distributed, "all_reduce", lambda means: means.add_(torch.arange(5) / 2))
    weights = [torch.randn(n, generator=generator) for n in (NUMELS if begin is None else [32])]
    parts = [[...]] * len(NUMELS)
    if begin is not None:
        edges = [min(max(edge - begin, 0), 32) for edge in itertools.accumulate([0, *NUMELS])]
        parts = [[slice(*pair) for pair in itertools.pairwise(edges)]]
    numels = [[n] for n in NUMELS] if begin is None else [NUMELS]
    parameters = [torch.nn.Parameter(weight.clone()) for weight in weights]
    optimizer = StableAdamW([{"params": parameters}], **SETTINGS)
    if begin is not None:
        optimizer.partitions = {parameters[0]: Partition(parts[0], NUMELS)}
    moments = [torch.zeros(2, len(weight)) for weight in weights]
    for step in range(1, 4):
        for parameter, *rest in zip(parameters, weights, moments, parts, numels, strict=True):
            weight, held, part, numel = rest
            parameter.grad = torch.randn(len(weight), generator=generator) * 10.0**step
            step_part_by_part(weight, parameter.grad, held, step, part, numel)
        optimizer.step()
    for parameter, weight, held in zip(parameters, weights, moments, strict=True):
        state = optimizer.state[parameter]
        assert torch.equal(parameter.detach(), weight)
        assert torch.equal(torch.stack([state["exp_avg"], state["exp_avg_sq"]]), held)


def test_stable_adamw_calls_three_operations_for_a_tensor_and_few_for_all():
    def calls(count: int) -> int:
        parameters = [torch.nn.Parameter(torch.ones(3)) for _ in range(count)]
        optimizer = StableAdamW([{"params": parameters}], **SETTINGS)
        for _ in range(2):
            for parameter in parameters:
                parameter.grad = torch.ones(3)
            with CountCalls() as counted:
                optimizer.step()
        # Without the number of the step, which is on the host.
        return counted.calls - count

    assert calls(2) < 40
    assert calls(12) - calls(2) == 10 * 3


def test_a_closure_is_called_with_gradients():
    parameter = torch.nn.Parameter(torch.ones(3))
    optimizer = StableAdamW([{"params": [parameter]}], **SETTINGS)

    def closure() -> float:
        loss = parameter.square().sum()
        loss.backward()
        return float(loss.detach())

    assert optimizer.step(closure) == 3.0
    assert bool((parameter < 1).all())


@pytest.mark.parametrize("name", ["mosaicbert-base", "mosaicbert-large"])
def test_weight_decay_equals_composers(name):
    """With no gradient, each step multiplies weights by 1 - (lr / lr_0) * 1e-5, over the recipe's own schedule."""
    recipe = read_recipe(f"--recipe={name}")
    config, total = recipe.optimizer, 2000
    parameter = torch.nn.Parameter(torch.ones(5, dtype=torch.float64))
    groups = [{"params": [parameter], "weight_decay": config.weight_decay}]
    optimizer = torch.optim.AdamW(groups, lr=config.lr, betas=config.betas, eps=config.eps)
    expected = 1.0
    for step in range(total):
        lr = config.lr * lr_factor(step, total, config)
        optimizer.param_groups[0]["lr"] = lr
        parameter.grad = torch.zeros_like(parameter)
        optimizer.step()
        expected *= 1 - lr / config.lr * 1e-5
    assert 0.98 < expected < 0.995
    assert parameter.detach().tolist() == pytest.approx([expected] * 5, rel=1e-12)


@pytest.mark.parametrize(
    ("changes", "zero", "message"),
    [
        (
            {"name": "stable_adamw"},
            {"stage": 2, "offload_optimizer": {"device": "cpu"}},
            "an offloaded optimizer cannot. Remove zero_optimization.offload_optimizer, or use optimizer.name adamw",
        ),
        (
            {"name": "muon"},
            {"stage": 2},
            "max_grad_norm is 1.0, but with Muon ZeRO clips the orthogonalized updates instead of the gradients. Set "
            "optimizer.max_grad_norm 0, or use ZeRO 0.",
        ),
        ({"name": "muon", "max_grad_norm": 0.0}, {"stage": 3}, "zero_optimization.reduce_scatter false"),
        (
            {"name": "muon", "max_grad_norm": 0.0},
            {"stage": 2, "offload_optimizer": {"device": "cpu"}},
            "Remove zero_optimization.offload_optimizer",
        ),
    ],
)
def test_optimizers_that_would_train_wrongly_are_refused(changes, zero, message):
    assert message in str(why_not_optimizer(OptimizerConfig(**changes), ResolvedDsConfig({"zero_optimization": zero})))


def test_optimizers_that_train_rightly_are_not_refused():
    for stage in range(3):
        zero = ResolvedDsConfig({"zero_optimization": {"stage": stage}})
        assert why_not_optimizer(OptimizerConfig(name="muon", max_grad_norm=0.0), zero) is None
        assert why_not_optimizer(OptimizerConfig(), zero) is None
        assert why_not_optimizer(OptimizerConfig(name="stable_adamw"), zero) is None
    assert why_not_optimizer(OptimizerConfig(name="muon", max_grad_norm=1.0), ResolvedDsConfig({})) is None


# Compiling Newton-Schulz takes seconds in every process, and these tests need milliseconds of it.
EAGER = "import torch._dynamo; torch._dynamo.config.disable = True"


def train(corpus: Corpus, out: Path, stage: int, *more: str, ranks: int = 1, patch: str = "") -> list[float]:
    """The losses of a run. patch: code that every rank runs first."""
    out.mkdir()
    ds_config = ds_config_in(f"zero{stage}", out, bf16=False)
    if stage == 3:
        config = json.loads(ds_config.read_text())
        config["zero_optimization"]["reduce_scatter"] = False
        ds_config.write_text(json.dumps(config))
    command = patched(pretrain_command(corpus, out, *more, ds_config=ds_config))
    done = finish_ranks(start_ranks(command, ranks, PATCH=patch))
    assert done.code == 0, done.output
    return [record["loss"] for record in read_metrics(out / "metrics.jsonl") if "loss" in record]


def matrices(out: Path, step: int) -> torch.Tensor:
    """The matrices that Muon updates, as one vector."""
    weights = read_checkpoint(out / "checkpoints" / f"step-{step:08d}")[0]
    parts = [weight.flatten() for name, weight in sorted(weights.items()) if ".layers." in name and weight.dim() == 2]
    return torch.cat(parts)


@pytest.mark.parametrize("patch", [EAGER, pytest.param("", marks=pytest.mark.nightly)], ids=["eager", "compiled"])
def test_muon_takes_equal_steps_at_every_stage_and_resumes(corpus, tmp_path, patch):
    """Newton-Schulz runs in bf16, so another order of sums shows; a resumed run repeats its own order."""
    muon = ["--optimizer.name=muon", "--optimizer.max_grad_norm=0", "--run.max_steps=4", "--run.save_every_steps=2"]
    two = train(corpus, tmp_path / "2", 2, *muon, patch=patch)
    assert train(corpus, tmp_path / "3", 3, *muon, ranks=2, patch=patch) == pytest.approx(two, rel=1e-3)
    zero = train(corpus, tmp_path / "0", 0, *muon, patch=patch)
    assert zero == pytest.approx(two, rel=1e-3)
    change = matrices(tmp_path / "2", 4) - matrices(tmp_path / "2", 2)
    # An orthogonal step of 32 x 32 moves each number by lr / sqrt(32); the last two steps have 60 and 30 % of the peak.
    assert change.square().mean().sqrt() == pytest.approx(0.9 * 0.02 * 32**-0.5, rel=0.5)
    # Rounding in bf16 makes 2 to 10 % of the change, depending on how the CPU multiplies. Stage 0 rounds other numbers,
    # and where the singular values of a gradient are near 0, rounding makes their directions.
    for stage, most in (("3", 0.2), ("0", 0.5)):
        apart = matrices(tmp_path / stage, 4) - matrices(tmp_path / "2", 4)
        assert apart.norm() < most * change.norm()
    for stage, losses in ((0, zero), (2, two)):
        middle, again = tmp_path / f"{stage}/checkpoints/step-00000002", tmp_path / f"again-{stage}"
        assert train(corpus, again, stage, *muon, f"--run.resume={middle}", patch=patch) == losses[2:]
        assert torch.equal(matrices(again, 4), matrices(tmp_path / f"{stage}", 4))


@pytest.mark.parametrize(
    ("stage", "ranks"), cases([(2, 2)], [(1, 1), (1, 2), (1, 3), (2, 1), (2, 2), (3, 1), (3, 2), (3, 3)])
)
def test_stable_adamw_takes_the_steps_of_stage_0_at_every_stage(corpus, tmp_path, stage, ranks):
    """At a learning rate at which the updates are shortened; a rank's partition begins and ends within parameters."""
    # Of a size with which three ranks can share a step, too.
    more = ["--optimizer.name=stable_adamw", "--optimizer.lr=1e-2", "--optimizer.betas=[0.9, 0.99]"]
    more += ["--optimizer.warmup=0", "--run.max_steps=6", "--run.save_every_steps=3", "--data.micro_batch_tokens=128"]
    more += [f"--data.global_batch_tokens={128 * 6}", "--model.hidden_dropout=0"]
    curve = train(corpus, tmp_path / "whole", 0, *more)
    assert curve[-1] < curve[0] - 0.05
    assert train(corpus, tmp_path / "parts", stage, *more, ranks=ranks) == pytest.approx(curve, rel=1e-5)
    weights, expected = (
        read_checkpoint(tmp_path / name / "checkpoints/step-00000006")[0] for name in ("parts", "whole")
    )
    for name, weight in expected.items():
        torch.testing.assert_close(weights[name], weight, rtol=1e-3, atol=1e-5, msg=lambda text, n=name: f"{n}: {text}")
    middle = f"--run.resume={tmp_path / 'parts/checkpoints/step-00000003'}"
    train(corpus, tmp_path / "again", stage, *more, middle, ranks=ranks)
    again = read_checkpoint(tmp_path / "again/checkpoints/step-00000006")[0]
    assert all(torch.equal(again[name], weight) for name, weight in weights.items())
    if ranks == 3:
        fewer = train(corpus, tmp_path / "fewer", stage, *more, middle, ranks=2)
        assert fewer == pytest.approx(curve[3:], rel=1e-5)


@pytest.mark.nightly
@pytest.mark.parametrize("stage", [0, 1, 2])
def test_an_optimizer_that_counts_steps_per_group_resumes_on_another_number_of_ranks(corpus, tmp_path, stage):
    """A stand-in for apex's FusedAdam, which is not chosen at ZeRO 3."""
    patch = "from tests.training.helpers.group_steps import install; install()"
    more = ["--run.max_steps=6", "--run.save_every_steps=3", "--model.hidden_dropout=0"]
    expected = train(corpus, tmp_path / "torch", stage, *more)
    two = train(corpus, tmp_path / "two", stage, *more, ranks=2, patch=patch)
    assert two == pytest.approx(expected, rel=1e-5)
    middle = f"--run.resume={tmp_path / 'two/checkpoints/step-00000003'}"
    for ranks in (2, 1):
        resumed = train(corpus, tmp_path / f"on-{ranks}", stage, *more, middle, ranks=ranks, patch=patch)
        assert resumed == pytest.approx(two[3:], rel=1e-5)
