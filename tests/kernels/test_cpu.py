"""The CPU's fused operations against the specification in model/ops.py."""

from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from torch import Tensor

from megabert.kernels import cpu
from megabert.model import buckets, ops
from megabert.model.alibi import alibi_slopes
from megabert.model.attention import PLANNERS
from megabert.model.configuration_megabert import MegaBertConfig
from megabert.model.layers import set_ops
from megabert.model.modeling_megabert import MegaBertForMaskedLM
from megabert.model.padding import Sequences
from tests.model.small import LENGTHS, documents, packed, small_model

NORM = {"eps": 1e-12, "low_precision": True}
LABELS = torch.tensor([3, 0, -100, 8, 8, -100, 1])


@pytest.fixture(autouse=True)
def many_kinds_of_inputs():
    """As cpu_ops() allows them."""
    with torch._dynamo.config.patch(recompile_limit=64):
        yield


def normal(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64)


def ids(rows: int) -> Tensor:
    return torch.arange(7) * 5 % rows


# Each operation, as a function of its floating-point inputs, by (implementation, dropout).
CASES = {
    "geglu": (lambda use, p: lambda x: use.geglu(x, p), lambda: [normal(7, 22)]),
    "add_layer_norm": (
        lambda use, p: lambda *x: use.add_layer_norm(*x, dropout_p=p, **NORM),
        lambda: [normal(7, 10), normal(7, 10), normal(10), normal(10)],
    ),
    "embed_layer_norm": (
        lambda use, p: lambda a, b, *x: use.embed_layer_norm([ids(9), ids(2)], [a, b], *x, dropout_p=p, **NORM),
        lambda: [normal(9, 10), normal(2, 10), normal(10), normal(10)],
    ),
    "masked_cross_entropy": (
        lambda use, p: lambda *x: use.masked_cross_entropy(*x, LABELS).loss_sum,
        lambda: [normal(7, 10), normal(9, 10), normal(9)],
    ),
    "z_loss": (
        lambda use, p: lambda *x: use.masked_cross_entropy(*x, LABELS, 0.3).loss_sum,
        lambda: [normal(7, 10), normal(9, 10), normal(9)],
    ),
}


def results(function, inputs: list[Tensor], autocast: bool = False) -> list[Tensor]:
    """The output and the gradient of every input, in fp64; the output is weighted so that no gradient is trivial."""
    inputs = [x.detach().clone().requires_grad_() for x in inputs]
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        out = function(*inputs)
    weights = torch.linspace(-1, 1, out.numel(), dtype=torch.float64).view(out.shape).to(out.dtype)
    (out if out.dim() == 0 else (out * weights).sum()).backward()
    return [part.double() for part in (out.detach(), *(x.grad for x in inputs))]


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 1e-5)])
def test_equals_the_specification(name, dtype, tolerance):
    build, make = CASES[name]
    inputs = [x.to(dtype) for x in make()]
    for got, expected in zip(results(build(cpu, 0), inputs), results(build(ops, 0), inputs), strict=True):
        torch.testing.assert_close(got, expected, rtol=tolerance, atol=tolerance)


def test_the_row_of_padding_gets_no_gradient():
    inputs = CASES["embed_layer_norm"][1]()

    def call(use):
        return lambda a, b, *x: use.embed_layer_norm([ids(9), ids(2)], [a, b], *x, dropout_p=0.0, padding_idx=5, **NORM)

    got, expected = results(call(cpu), inputs), results(call(ops), inputs)
    assert not got[1][5].any()
    for a, b in zip(got, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("dropout", [0, 0.3])
def test_gradients_are_those_of_finite_differences(name, dropout):
    build, make = CASES[name]

    def seeded(*inputs: Tensor) -> Tensor:
        torch.manual_seed(3)
        return build(cpu, dropout)(*inputs)

    assert torch.autograd.gradcheck(seeded, [x.requires_grad_() for x in make()])


@pytest.mark.parametrize("name", CASES)
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
        rounding = 2**-9 * expected.norm()  # where the plain one happens to be exact
        assert (got - expected).norm() <= 2 * max((other - expected).norm(), rounding)


def murmur(seed: int, places: np.ndarray) -> np.ndarray:
    """The finaliser of MurmurHash3, from its definition, in unsigned arithmetic."""
    h = (places.astype(np.uint32) * np.uint32(2654435761)) ^ np.uint32(seed & 0xFFFFFFFF)
    h = (h ^ (h >> np.uint32(16))) * np.uint32(0x85EBCA6B)
    h = (h ^ (h >> np.uint32(13))) * np.uint32(0xC2B2AE35)
    return h ^ (h >> np.uint32(16))


def test_dropout_keeps_what_its_hash_says():
    dropout = cpu.Dropout(torch.tensor(-123_456_789, dtype=torch.int32), -(1 << 31) + round(0.3 * 2**32), 1 / 0.7)
    got = cpu.drop(torch.ones(50, 33), dropout)
    bits = murmur(-123_456_789, np.arange(50 * 33)).view(np.int32).reshape(50, 33)
    expected = np.where(bits >= dropout.threshold, np.float32(dropout.scale), np.float32(0))
    assert np.array_equal(got.numpy(), expected)


@pytest.mark.parametrize("probability", [0.1, 0.5])
def test_dropout_drops_its_share_independently(probability):
    """Within five standard deviations: the share, and how often two neighbours, or two seeds, drop together."""
    ones = torch.ones(512, 512)
    first, second = (cpu.drop(ones, cpu.draw_dropout(probability)) == 0 for _ in range(2))
    count = ones.numel()
    pairs = {"below": first[1:] & first[:-1], "beside": first[:, 1:] & first[:, :-1], "seeds": first & second}
    for share, expected in [(first, probability), *((pair, probability**2) for pair in pairs.values())]:
        deviation = (expected * (1 - expected) / count) ** 0.5
        assert abs(share.double().mean().item() - expected) < 5 * deviation


def test_one_seed_gives_one_result():
    x = torch.randn(64, 128)
    torch.manual_seed(5)
    first, other = cpu.geglu(x, 0.5), cpu.geglu(x, 0.5)
    torch.manual_seed(5)
    assert torch.equal(cpu.geglu(x, 0.5), first)
    assert not torch.equal(first, other)


def test_pieces_of_logits_change_nothing(monkeypatch):
    """One row at a time, two rows of gradients kept: the loss and gradients of the whole matrix."""
    build, make = CASES["masked_cross_entropy"]
    inputs = make()
    whole = results(build(cpu, 0), inputs)
    monkeypatch.setattr(cpu, "PIECE_BYTES", 1)
    monkeypatch.setattr(cpu, "KEPT_BYTES", {8: 2 * 9 * 8})
    for got, expected in zip(results(build(cpu, 0), inputs), whole, strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-12, atol=1e-12)
    counted = cpu.masked_cross_entropy(*inputs, LABELS)
    assert [int(x) for x in counted[1:]] == [int(x) for x in ops.masked_cross_entropy(*inputs, LABELS)[1:]]


@pytest.mark.parametrize("rows", [7, 0])
@pytest.mark.parametrize("use", [cpu, ops])
def test_no_target_and_no_row(use, rows):
    hidden, weight, bias = CASES["masked_cross_entropy"][1]()
    leaves = [x.requires_grad_() for x in (hidden[:rows], weight, bias)]
    loss = use.masked_cross_entropy(*leaves, torch.full((rows,), -100))
    assert (float(loss.loss_sum.detach()), int(loss.num_correct), int(loss.num_targets)) == (0, 0, 0)
    loss.loss_sum.backward()
    assert not any(x.grad.any() for x in leaves)


def test_without_gradients_none_are_computed(monkeypatch):
    """Of a loss whose parameters could have some; attention then keeps no weights either."""
    leaves = [x.requires_grad_() for x in CASES["masked_cross_entropy"][1]()]
    asked = []
    compute = cpu._loss_and_gradients
    monkeypatch.setattr(cpu, "_loss_and_gradients", lambda *x: asked.append(x[-1]) or compute(*x))
    with torch.no_grad():
        got = cpu.masked_cross_entropy(*leaves, LABELS)
    assert torch.equal(got.loss_sum, cpu.masked_cross_entropy(*leaves, LABELS).loss_sum)
    assert asked == [False, True]


def test_a_cpu_without_bf16_products_computes_the_same(monkeypatch):
    inputs = [x.bfloat16() for x in CASES["masked_cross_entropy"][1]()]
    build, _ = CASES["masked_cross_entropy"]
    expected = results(build(ops, 0), inputs)
    monkeypatch.setattr(cpu, "has_bf16_products", lambda: False)
    for got, other in zip(results(build(cpu, 0), inputs), expected, strict=True):
        torch.testing.assert_close(got, other, rtol=0.02, atol=0.02)


@pytest.mark.parametrize("wrong", [-1, 9])
def test_an_id_or_a_label_that_is_no_row_is_an_error(wrong):
    table, norm = normal(9, 10), [normal(10), normal(10)]
    with pytest.raises(IndexError, match=f"an id is {wrong}, expected 0 to 8"):
        cpu.embed_layer_norm([torch.tensor([3, wrong])], [table], *norm, dropout_p=0.0, **NORM)
    labels = torch.tensor([-100, wrong])
    with pytest.raises(IndexError, match=f"a label is {wrong}, expected 0 to 8"):
        cpu.masked_cross_entropy(normal(2, 10), table, normal(9), labels)
    with pytest.raises((IndexError, RuntimeError), match="out of bounds"):
        ops.masked_cross_entropy(normal(2, 10), table, normal(9), labels)


def test_what_was_allocated_in_inference_mode_serves_training():
    build, make = CASES["masked_cross_entropy"]
    inputs = make()
    cpu.free_workspaces()
    expected = results(build(cpu, 0), inputs)
    cpu.free_workspaces()
    with torch.inference_mode():
        build(cpu, 0)(*inputs)
    for got, other in zip(results(build(cpu, 0), inputs), expected, strict=True):
        assert torch.equal(got, other)


def test_threads_do_not_share_scratch_memory():
    torch._dynamo.reset()  # other threads do not see the limit set above
    build, _ = CASES["masked_cross_entropy"]
    torch.manual_seed(0)
    inputs = [[normal(7, 10), normal(9, 10), normal(9)] for _ in range(3)]
    expected = [results(build(cpu, 0), part) for part in inputs]
    with ThreadPoolExecutor(3) as threads:
        for _ in range(20):
            for found, alone in zip(
                threads.map(lambda part: results(build(cpu, 0), part), inputs), expected, strict=True
            ):
                for a, b in zip(found, alone, strict=True):
                    assert torch.equal(a, b)


def test_all_can_be_dropped():
    assert not cpu.geglu(normal(7, 22), 1.0).any()


@pytest.mark.parametrize("kept", [12, 5])
@pytest.mark.parametrize("alibi", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_attention_by_length_errs_at_most_twice_as_much_as_plain(monkeypatch, dtype, alibi, kept):
    """Documents no longer than `kept` keep their weights; the others compute them again, four queries at a time."""
    monkeypatch.setattr(buckets, "LONGEST_KEPT", kept)
    monkeypatch.setattr(buckets, "QUERY_ROWS", 4)
    bounds = torch.tensor([0, *LENGTHS, 0]).cumsum(0).int()
    plan = (Sequences(bounds, 12), alibi_slopes(4) if alibi else None, 16)
    qkv = normal(int(bounds[-1]), 3, 4, 16)
    exact = results(lambda x: PLANNERS["eager"](*plan)(x, 0.0), [qkv])
    plain, fast = (
        results(lambda x, name=name: PLANNERS[name](*plan)(x, 0.0), [qkv.to(dtype)]) for name in ("eager", "sdpa")
    )
    for got, other, expected in zip(fast, plain, exact, strict=True):
        assert (got - expected).norm() <= 2 * (other - expected).norm()


def test_a_whole_model_computes_the_same():
    """Loss and every gradient in fp64, through packed documents and masked rows."""
    batch = packed(documents()) | {"position_ids": torch.zeros(0)}
    batch |= {"masked_positions": torch.tensor([0, 3, 9, 20, 0]), "masked_labels": torch.tensor([11, 12, 13, 14, -100])}
    plain, fused = small_model(), small_model()
    set_ops(fused, cpu.CPU_OPS)
    outputs = [model.masked_loss(**batch) for model in (plain, fused)]
    for a, b in zip(*outputs, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-10)
    for output in outputs:
        output.loss_sum.backward()
    for (name, a), b in zip(plain.named_parameters(), fused.parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad, rtol=0, atol=1e-10, msg=lambda m, n=name: f"{n}: {m}")


def test_models_of_any_width_share_what_was_compiled():
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

    first = step(32, 90)
    assert step(48, 104) == step(64, 125) == first


def test_says_where_attention_computes_padding():
    assert "attention over padded rows;" in cpu.cpu_ops(MegaBertConfig(padding="padded"), bf16=True)[1]


def test_plain_operations_and_their_reason(monkeypatch):
    """Without a compiler, and where compiling gains nothing."""
    plain = ops.TORCH_OPS._replace(attention=PLANNERS["sdpa"])
    without, with_dropout = (MegaBertConfig(hidden_dropout_prob=p) for p in (0.0, 0.1))
    chosen, said = cpu.cpu_ops(without, bf16=False)
    assert chosen == plain
    assert said.endswith("(in fp32 without dropout fusing them gains nothing)")
    for config, bf16 in ((without, True), (with_dropout, False)):
        assert cpu.cpu_ops(config, bf16)[0].geglu is cpu.geglu

    def none():
        raise cpu.exc.InvalidCxxCompiler

    monkeypatch.setattr(cpu.cpp_builder, "get_cpp_compiler", none)
    chosen, said = cpu.cpu_ops(with_dropout, bf16=True)
    assert chosen == plain
    assert said.endswith("(torch.compile finds no C++ compiler (install g++, or set CXX))")
