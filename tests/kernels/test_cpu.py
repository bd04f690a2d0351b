"""The CPU's operations against the specification in model/ops.py; run eagerly, and compiled in the nightly run."""

from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from torch import Tensor

from megabert.kernels import cpu
from megabert.kernels.cpu import cross_entropy
from megabert.kernels.cpu.compiled import Dropout, draw_dropout, drop
from megabert.kernels.cpu.rotate import rotate
from megabert.kernels.resolve import RECOMPILE_LIMIT
from megabert.model import buckets, ops
from megabert.model.attention import PLANNERS
from megabert.model.layers import set_ops
from megabert.model.ops import alibi_slopes
from megabert.model.padding import Sequences
from tests.helpers.cases import cases
from tests.kernels.helpers.cpu_operations import CASES, LABELS, NORM, ids, normal, results
from tests.model.helpers.small import LENGTHS, documents, packed, small_model


@pytest.fixture(autouse=True, params=["force_eager", pytest.param("default", marks=pytest.mark.nightly)])
def stance(request):
    """Whether the operations run eagerly, which takes no time to compile, or as inductor compiles them."""
    limit = torch._dynamo.config.patch(recompile_limit=RECOMPILE_LIMIT)
    with torch.compiler.set_stance(request.param), limit:
        yield request.param


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 1e-5)])
def test_equals_the_specification(name, dtype, tolerance):
    build, make = CASES[name]
    inputs = [x.to(dtype) for x in make()]
    for got, expected in zip(results(build(cpu, 0), inputs), results(build(ops, 0), inputs), strict=True):
        torch.testing.assert_close(got, expected, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 1e-5), (torch.bfloat16, 2**-7)]
)
def test_rotate_equals_the_specification(dtype, tolerance):
    table = ops.rope_table(torch.arange(7) * 5, 8, 100.0)
    inputs = [normal(7, 3, 2, 8).to(dtype)]
    got, expected = (results(lambda x, f=f: f(x, table), inputs) for f in (rotate, ops.rotate))
    for a, b in zip(got, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)


def test_rotates_gradient_is_that_of_finite_differences():
    table = ops.rope_table(torch.arange(3) * 5, 4, 100.0).double()
    assert torch.autograd.gradcheck(lambda x: rotate(x, table), normal(3, 3, 2, 4).requires_grad_())


def test_the_row_of_padding_gets_no_gradient():
    inputs = CASES["embed_layer_norm"][1]()

    def call(use):
        return lambda a, b, *x: use.embed_layer_norm([ids(9), ids(2)], [a, b], *x, dropout_p=0.0, padding_idx=5, **NORM)

    got, expected = results(call(cpu), inputs), results(call(ops), inputs)
    assert not got[1][5].any()
    for a, b in zip(got, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("dropout", cases(per_push=[[0.3]], nightly=[[0], [0.3]]))
def test_gradients_are_those_of_finite_differences(name, dropout):
    build, make = CASES[name]

    def seeded(*inputs: Tensor) -> Tensor:
        torch.manual_seed(3)
        return build(cpu, dropout)(*inputs)

    assert torch.autograd.gradcheck(seeded, [x.requires_grad_() for x in make()])


def murmur(seed: int, places: np.ndarray) -> np.ndarray:
    """Compute MurmurHash3's finaliser from its definition, in unsigned arithmetic."""
    h = (places.astype(np.uint32) * np.uint32(2654435761)) ^ np.uint32(seed & 0xFFFFFFFF)
    h = (h ^ (h >> np.uint32(16))) * np.uint32(0x85EBCA6B)
    h = (h ^ (h >> np.uint32(13))) * np.uint32(0xC2B2AE35)
    return h ^ (h >> np.uint32(16))


def test_dropout_keeps_the_elements_that_its_hash_selects():
    dropout = Dropout(torch.tensor(-123_456_789, dtype=torch.int32), -(1 << 31) + round(0.3 * 2**32), 1 / 0.7)
    got = drop(torch.ones(50, 33), dropout)
    bits = murmur(-123_456_789, np.arange(50 * 33)).view(np.int32).reshape(50, 33)
    expected = np.where(bits >= dropout.threshold, np.float32(dropout.scale), np.float32(0))
    assert np.array_equal(got.numpy(), expected)


@pytest.mark.parametrize("probability", [0.1, 0.5])
def test_dropout_drops_its_share_independently(probability):
    """The share, and how often two neighbours or two seeds drop together, are within five standard deviations."""
    ones = torch.ones(512, 512)
    first, second = (drop(ones, draw_dropout(probability)) == 0 for _ in range(2))
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


def test_computing_logits_in_parts_changes_nothing(monkeypatch):
    """One row at a time, with two rows of gradients kept, gives the loss and gradients of the whole matrix."""
    build, make = CASES["masked_cross_entropy"]
    inputs = hidden, weight, bias = make()
    whole = results(build(cpu, 0), inputs)
    monkeypatch.setattr(cross_entropy, "LOGITS_BYTES", 1)
    monkeypatch.setattr(cross_entropy, "GRADIENT_BYTES", {8: 2 * 9 * 8})
    for got, expected in zip(results(build(cpu, 0), inputs), whole, strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-12, atol=1e-12)
    counted = cpu.masked_cross_entropy(hidden, weight, bias, LABELS)
    expected = ops.masked_cross_entropy(hidden, weight, bias, LABELS)
    assert [int(x) for x in counted[1:]] == [int(x) for x in expected[1:]]


@pytest.mark.parametrize("rows", [7, 0])
@pytest.mark.parametrize("use", [cpu, ops])
def test_no_target_and_no_row(use, rows):
    hidden, weight, bias = CASES["masked_cross_entropy"][1]()
    leaves = [x.requires_grad_() for x in (hidden[:rows], weight, bias)]
    loss = use.masked_cross_entropy(*leaves, torch.full((rows,), -100))
    assert (float(loss.loss_sum.detach()), int(loss.num_correct), int(loss.num_targets)) == (0, 0, 0)
    assert not any(gradient.any() for gradient in torch.autograd.grad(loss.loss_sum, leaves))


def test_without_gradients_none_are_computed(monkeypatch):
    """Parameters require gradients, but the loss is computed under no_grad."""
    hidden, weight, bias = (x.requires_grad_() for x in CASES["masked_cross_entropy"][1]())
    needs_grad = []
    compute = cross_entropy._loss_and_gradients
    monkeypatch.setattr(cross_entropy, "_loss_and_gradients", lambda *x: needs_grad.append(x[-1]) or compute(*x))
    with torch.no_grad():
        got = cpu.masked_cross_entropy(hidden, weight, bias, LABELS)
    assert torch.equal(got.loss_sum, cpu.masked_cross_entropy(hidden, weight, bias, LABELS).loss_sum)
    assert needs_grad == [False, True]


def test_a_cpu_without_bf16_products_computes_the_same(monkeypatch):
    inputs = [x.bfloat16() for x in CASES["masked_cross_entropy"][1]()]
    build, _ = CASES["masked_cross_entropy"]
    expected = results(build(ops, 0), inputs)
    monkeypatch.setattr(cross_entropy, "has_bf16_products", lambda: False)
    for got, other in zip(results(build(cpu, 0), inputs), expected, strict=True):
        torch.testing.assert_close(got, other, rtol=0.02, atol=0.02)


@pytest.mark.parametrize("wrong", [-1, 9])
def test_an_id_or_a_label_out_of_range_is_an_error(wrong):
    table, norm = normal(9, 10), [normal(10), normal(10)]
    with pytest.raises(IndexError, match=f"an id is {wrong}, expected 0 to 8"):
        cpu.embed_layer_norm([torch.tensor([3, wrong])], [table], *norm, dropout_p=0.0, **NORM)
    labels = torch.tensor([-100, wrong])
    with pytest.raises(IndexError, match=f"a label is {wrong}, expected 0 to 8"):
        cpu.masked_cross_entropy(normal(2, 10), table, normal(9), labels)
    with pytest.raises((IndexError, RuntimeError), match="out of bounds"):
        ops.masked_cross_entropy(normal(2, 10), table, normal(9), labels)


def test_a_buffer_allocated_in_inference_mode_can_be_used_in_training():
    build, make = CASES["masked_cross_entropy"]
    inputs = make()
    cross_entropy.free_workspaces()
    expected = results(build(cpu, 0), inputs)
    cross_entropy.free_workspaces()
    with torch.inference_mode():
        build(cpu, 0)(*inputs)
    for got, other in zip(results(build(cpu, 0), inputs), expected, strict=True):
        assert torch.equal(got, other)


def test_threads_do_not_share_scratch_memory():
    # Other threads do not see the recompile limit set above.
    torch._dynamo.reset()
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


def test_dropout_of_probability_one_drops_everything():
    assert not cpu.geglu(normal(7, 22), 1.0).any()


@pytest.mark.parametrize("kept", [12, 5])
@pytest.mark.parametrize("alibi", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_attention_by_length_errs_at_most_twice_as_much_as_plain(monkeypatch, dtype, alibi, kept):
    """Documents of up to `kept` tokens keep their weights; longer ones compute them again, four queries at a time."""
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
