"""embed_layer_norm in Triton's interpreter: results, gradients of the tables, dropout, bytes moved."""

from itertools import product

import pytest
import torch

from megabert.kernels import embed_layer_norm as kernels
from megabert.model import ops
from tests.helpers.cases import cases
from tests.kernels.helpers import interpreter
from tests.kernels.helpers.interpreter import counted
from tests.kernels.helpers.yardstick import assert_as_good, assert_gradients

interpreter.install()

EPS = 1e-12
BF16, FP32 = torch.bfloat16, torch.float32
ROWS = (50, 2, 40)
SHAPES = [(1, 16), (7, 20), (33, 8), (3, 768), (300, 8)]


def inputs(width, tables=2):
    return [*(torch.randn(rows, width) for rows in ROWS[:tables]), 1 + torch.randn(width) / 4, torch.randn(width)]


def some_ids(tokens, tables=2, dtype=torch.int64):
    return [torch.randint(rows, (tokens,), dtype=dtype) for rows in ROWS[:tables]]


def call(module, ids, dropout_p=0.0, low_precision=True, padding_idx=None):
    def function(*arguments):
        *tables, weight, bias = arguments
        if dropout_p:
            torch.manual_seed(5)
        options = {"eps": EPS, "dropout_p": dropout_p, "low_precision": low_precision, "padding_idx": padding_idx}
        return module.embed_layer_norm(ids, tables, weight, bias, **options)

    return function


@pytest.mark.parametrize(
    ("tokens", "width", "tables", "programs"),
    cases(
        per_push=[(1, 16, 1, 256), (7, 20, 3, 256), (33, 8, 2, 4)],
        nightly=[(*shape, tables, 256) for shape, tables in product(SHAPES, [1, 2, 3])],
    ),
)
def test_equals_the_specification(monkeypatch, tokens, width, tables, programs):
    """programs: of the backward pass; where there are more tokens, each program sums over several."""
    monkeypatch.setattr(kernels, "num_programs", lambda rows, width, device: min(rows, programs))
    ids = some_ids(tokens, tables)
    assert_as_good(call(kernels, ids), call(ops, ids), inputs(width, tables))


def test_the_row_of_padding_gets_no_gradient():
    ids = some_ids(30)
    ids[0][::7] = 3
    assert (ids[0] == 3).any()
    assert_as_good(call(kernels, ids, padding_idx=3), call(ops, ids, padding_idx=3), inputs(24))


@pytest.mark.parametrize("low_precision", [True, False])
def test_equals_it_under_autocast(low_precision):
    ids = some_ids(20, dtype=torch.int32)
    assert_as_good(
        call(kernels, ids, 0.0, low_precision), call(ops, ids, 0.0, low_precision), inputs(96), autocast=True
    )


def test_equals_it_in_pure_bf16():
    ids = some_ids(20)
    assert_as_good(call(kernels, ids), call(ops, ids), [x.bfloat16() for x in inputs(96)])


@pytest.mark.parametrize("dropout_p", cases(per_push=[[0.3]], nightly=[[0.0], [0.3]]))
def test_gradients(dropout_p):
    ids = some_ids(5, 3)
    assert_gradients(call(kernels, ids, dropout_p), inputs(24, 3))


def test_dropout_is_on_the_result():
    ids, arguments = some_ids(6), inputs(64)
    mask = call(kernels, ids, 0.25)(*arguments) != 0
    assert 0.6 < mask.double().mean() < 0.9
    assert_as_good(call(kernels, ids, 0.25), lambda *x: call(ops, ids)(*x) * mask / 0.75, arguments)


@pytest.mark.parametrize(
    ("tokens", "kinds"),
    cases(
        per_push=[(1, 7), (9, 1000), (65, 7), (65, 1)],
        nightly=product([1, 2, 9, 64, 65, 200], [1, 2, 7, 1000]),
    ),
)
def test_scatter_adds_every_row_once(tokens, kinds):
    """Runs of one id inside a chunk, across its end, over several whole chunks, and over all tokens."""
    ids = torch.randint(kinds, (tokens,))
    dz = torch.randn(tokens, 300, dtype=torch.float64)
    table = torch.zeros(kinds + 1, 300, dtype=torch.float64)
    wanted = torch.zeros_like(table).index_add(0, ids, dz)
    torch.testing.assert_close(kernels.scatter_rows(dz, ids, table), wanted, rtol=0, atol=1e-12)


def test_scatter_gives_the_same_bits_in_every_run_and_for_shifted_ids():
    dz = torch.randn(100, 8)
    ids = torch.randint(3, (100,))
    first, second = (kernels.scatter_rows(dz, ids, torch.zeros(3, 8)) for _ in range(2))
    assert torch.equal(first, second)
    shifted = kernels.scatter_rows(dz, ids + 2, torch.zeros(5, 8))
    assert torch.equal(shifted[2:], first)


def test_chunks_have_about_sqrt_t_tokens():
    assert [kernels.chunk_size(tokens) for tokens in (0, 1, 15, 16, 8192, 131_072)] == [1, 1, 4, 4, 128, 512]


def test_no_tokens():
    leaves = [x.requires_grad_() for x in inputs(16)]
    gradients = torch.autograd.grad(call(kernels, some_ids(0), 0.1)(*leaves).sum(), leaves)
    assert [x.shape for x in gradients] == [x.shape for x in leaves]
    assert not any(x.any() for x in gradients)


def test_ids_and_tables_must_match():
    arguments = inputs(16)
    with pytest.raises(ValueError, match="got 1 ids for 2 tables, expected one for each of 1 to 3"):
        call(kernels, some_ids(4, 1))(*arguments)


@pytest.mark.parametrize("dropout_p", [0.0, 0.1])
@pytest.mark.parametrize("tables", [2, 3])
def test_moves_the_bytes_of_its_formula(dropout_p, tables):
    tokens, width, y_size, t_size, i_size = 3, 24, 2, 4, 8
    ids = [torch.arange(tokens) % rows for rows in ROWS[:tables]]
    leaves = [x.requires_grad_() for x in inputs(width, tables)]
    seed = 8 if dropout_p else 0
    with torch.autocast("cpu", BF16), counted() as forward:
        y = call(kernels, ids, dropout_p)(*leaves)
    gathered = tables * (width * t_size + i_size)
    assert forward.loaded == tokens * (gathered + 8 * width + seed)
    assert forward.stored == tokens * (width * y_size + 8)
    with counted() as backward:
        kernels.backward(torch.ones_like(y), ids, leaves[:tables], *_saved(tokens, width, dropout_p))
    assert backward.loaded == tokens * (gathered + width * y_size + 8 + seed) + tokens * 4 * width
    assert backward.stored == tokens * width * y_size + tokens * 8 * width


def _saved(tokens, width, dropout_p):
    seed = torch.zeros(1, dtype=torch.int64) if dropout_p else None
    return torch.ones(width), torch.zeros(tokens), torch.ones(tokens), seed, dropout_p


def test_scatter_moves_the_bytes_of_its_formula():
    """Four tokens with different ids in two chunks of two: no run crosses a chunk."""
    tokens, width = 4, 300
    with counted() as traffic:
        kernels.scatter_rows(torch.randn(tokens, width).bfloat16(), torch.arange(tokens), torch.zeros(tokens, width))
    chunks, blocks = 2, 2
    # Each chunk reads its first id and one id of each neighbour; carry_kernel then reads three ids for its chunk.
    neighbours = 8 * blocks * (chunks + 2 + 3)
    assert traffic.loaded == tokens * (width * 2 + blocks * 16) + neighbours
    assert traffic.stored == tokens * width * 4


def test_saves_no_sum_and_no_mask():
    saved = []
    arguments = [x.requires_grad_() for x in inputs(32)]
    with torch.autograd.graph.saved_tensors_hooks(lambda x: saved.append(x) or x, lambda x: x):
        call(kernels, some_ids(5), 0.1)(*arguments)
    assert sorted(x.numel() for x in saved) == [1, 5, 5, 5, 5, 32, 2 * 32, 50 * 32]


def test_torch_compile_sees_one_operation():
    tests = {"test_utils": ("test_schema", "test_faketensor")}
    ids, arguments = some_ids(4), inputs(32)
    *tables, weight, bias = arguments
    assert torch.library.opcheck(kernels.forward, (ids, tables, weight, bias, None, EPS, 0.0, BF16), **tests)
    dy = torch.randn(4, 32)
    assert torch.library.opcheck(kernels.backward, (dy, ids, tables, *_saved(4, 32, 0.0)), **tests)
    assert torch.library.opcheck(kernels.scatter_rows, (dy, ids[0], tables[0]), **tests)
    compiled = torch.compile(call(kernels, ids), fullgraph=True, backend="aot_eager")
    assert_as_good(compiled, call(ops, ids), arguments)
