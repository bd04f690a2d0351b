"""The CPU's operations as inductor compiles them, in training's precision."""

import pytest
import torch

from megabert.kernels import cpu
from megabert.kernels.resolve import RECOMPILE_LIMIT
from megabert.model import ops
from megabert.model.configuration_megabert import MegaBertConfig
from megabert.model.layers import set_ops
from megabert.model.modeling_megabert import MegaBertForMaskedLM
from tests.kernels.helpers.cpu_operations import CASES, results


@pytest.fixture(autouse=True)
def recompile_limit():
    """cpu_ops() sets the same limit."""
    with torch._dynamo.config.patch(recompile_limit=RECOMPILE_LIMIT):
        yield


PER_PUSH = ("add_layer_norm", "masked_cross_entropy")


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=() if name in PER_PUSH else pytest.mark.nightly) for name in CASES]
)
def test_in_bf16_errs_at_most_twice_as_much_as_plain_bf16(name):
    build, _ = CASES[name]
    torch.manual_seed(1)
    shapes = {
        "geglu": [(7, 512)],
        "add_layer_norm": [(7, 256), (7, 256), (256,), (256,)],
        "embed_layer_norm": [(9, 256), (2, 256), (256,), (256,)],
        "masked_cross_entropy": [(7, 256), (900, 256), (900,)],
        "z_loss": [(7, 256), (900, 256), (900,)],
    }[name]
    inputs = [torch.randn(shape) * (1 if "norm" in name or name == "geglu" else 0.1) for shape in shapes]
    if "norm" not in name:
        inputs[0] = inputs[0].bfloat16()
    exact = results(build(ops, 0), [x.double() for x in inputs])
    fused, plain = (results(build(use, 0), inputs, autocast=True) for use in (cpu, ops))
    for got, other, expected in zip(fused, plain, exact, strict=True):
        # Where plain PyTorch's result happens to be exact.
        rounding = 2**-9 * expected.norm()
        assert (got - expected).norm() <= 2 * max((other - expected).norm(), rounding)


@pytest.mark.parametrize("backend", ["eager", pytest.param("inductor", marks=pytest.mark.nightly)])
def test_models_of_any_width_share_the_compiled_code(backend):
    """Forward and backward of a second and a third width, with parameters, compile nothing."""

    def step(width: int, tokens: int) -> int:
        config = MegaBertConfig(
            vocab_size=50 + width,
            hidden_size=width,
            num_hidden_layers=2,
            num_attention_heads=4,
            intermediate_size=3 * width,
        )
        model = MegaBertForMaskedLM(config)
        set_ops(model, cpu.CPU_OPS)
        ids = torch.arange(tokens) % 50
        rows = torch.arange(tokens // 3)
        bounds = torch.tensor([0, 5, tokens], dtype=torch.int32)
        model.masked_loss(ids, ids, bounds, tokens, rows, rows).loss_sum.backward()
        return torch._dynamo.utils.counters["stats"]["unique_graphs"]

    with torch.compiler.set_stance("default", force_backend=backend):
        first = step(32, 90)
        assert first > 0
        assert step(48, 104) == step(64, 125) == first
