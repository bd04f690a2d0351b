"""The machine code of the Triton kernels for three generations of GPUs, compiled without a GPU.

No spilled registers, shared memory within the limit, 16-byte loads and stores, tensor cores in kernels with products.
The launches are those of MosaicBERT-Base and BERT-Large. At every push: the launch of each kernel that needs the most
registers and shared memory, for the GPU with the least shared memory; in the nightly run every precision and GPU.
"""

from itertools import product

import pytest
import torch

from tests.helpers.cases import cases

pytestmark = pytest.mark.triton

# A100, H100, B200.
CAPABILITIES = [80, 90, 100]
LEAST_SHARED_MEMORY = 80
BF16, FP32 = torch.bfloat16, torch.float32


def launches_of(call):
    from tests.kernels.helpers.aot import recorded

    with recorded() as launches:
        call()
    assert launches
    return launches


def assert_good_code(launches, capability, tensor_cores=(), stores=True):
    """tensor_cores: the names of kernels that multiply matrices. stores: whether the kernels write rows."""
    from tests.kernels.helpers.aot import SHARED_LIMIT, TENSOR_CORES, compile_for

    for launch in launches:
        code = compile_for(launch, capability)
        assert code.spills == 0, f"{launch.name}: {code.spills} bytes spilled, {code.registers} registers"
        assert code.shared <= SHARED_LIMIT[capability], f"{launch.name}: {code.shared} bytes of shared memory"
        loads = r"(ld\.global\S*\.v4|cp\.async\S* \[[^]]*\], \[[^]]*\], 0x10)"
        assert code.count(loads), f"{launch.name}: no 16-byte load"
        assert not stores or code.count(r"st\.global\S*\.v4"), f"{launch.name}: no 16-byte store"
        if launch.name in tensor_cores:
            assert code.count(TENSOR_CORES[capability]), f"{launch.name}: no {TENSOR_CORES[capability]}"


def assert_resident(launch, capability):
    """A multiprocessor holds all programs that num_programs() starts on it."""
    from megabert.kernels.row_statistics import RESIDENT_WARPS
    from tests.kernels.helpers.aot import compile_for, resident_programs

    assert launch.name.endswith("backward_kernel")
    warps = launch.options["num_warps"]
    assert resident_programs(compile_for(launch, capability), warps, capability) >= max(1, RESIDENT_WARPS // warps)


def leaf(*shape, dtype=BF16):
    return torch.zeros(shape, dtype=dtype, requires_grad=True)


@pytest.mark.parametrize(
    ("capability", "dropout_p", "dtype"),
    cases(per_push=[(LEAST_SHARED_MEMORY, 0.1, BF16)], nightly=product(CAPABILITIES, [0.0, 0.1], [BF16, FP32])),
)
def test_geglu(capability, dropout_p, dtype):
    from megabert.kernels.geglu import geglu

    launches = launches_of(lambda: geglu(leaf(16, 2 * 3072, dtype=dtype), dropout_p).sum().backward())
    assert [launch.name for launch in launches] == ["geglu.forward_kernel", "geglu.backward_kernel"]
    assert_good_code(launches, capability)


@pytest.mark.parametrize(
    ("capability", "dropout_p", "width", "residual_dtype"),
    cases(
        per_push=[(LEAST_SHARED_MEMORY, 0.1, 4096, FP32)],
        nightly=product(CAPABILITIES, [0.0, 0.1], [768, 1024, 4096], [BF16, FP32]),
    ),
)
def test_add_layer_norm(capability, dropout_p, width, residual_dtype):
    from megabert.kernels.add_layer_norm import add_layer_norm

    x, residual = leaf(16, width), leaf(16, width, dtype=residual_dtype)
    weight, bias = leaf(width, dtype=FP32), leaf(width, dtype=FP32)

    def call():
        options = {"eps": 1e-12, "dropout_p": dropout_p, "low_precision": True}
        torch.stack(add_layer_norm(x, residual, weight, bias, **options)).sum().backward()

    launches = launches_of(call)
    assert_good_code(launches, capability)
    assert_resident(launches[1], capability)


@pytest.mark.parametrize(
    "capability", cases(per_push=[[LEAST_SHARED_MEMORY]], nightly=[[capability] for capability in CAPABILITIES])
)
def test_layer_norm_alone(capability):
    from megabert.kernels.add_layer_norm import layer_norm

    def call():
        layer_norm(leaf(16, 768), leaf(768, dtype=FP32), leaf(768, dtype=FP32), 1e-12, True).sum().backward()

    assert_good_code(launches_of(call), capability)


@pytest.mark.parametrize(
    ("capability", "gradient", "dtype", "vocab_size"),
    cases(
        per_push=[(LEAST_SHARED_MEMORY, True, FP32, 30_522)],
        nightly=product(CAPABILITIES, [True, False], [BF16, FP32], [30_522, 30_528]),
    ),
)
def test_cross_entropy(capability, gradient, dtype, vocab_size):
    from megabert.kernels.cross_entropy import in_chunks

    hidden, weight, bias = (torch.zeros(shape, dtype=dtype) for shape in ((16, 8), (vocab_size, 8), vocab_size))
    labels = torch.zeros(16, dtype=torch.int64)
    launches = launches_of(lambda: in_chunks(hidden, weight, bias, labels, 0.0, gradient, dtype))
    assert [launch.name for launch in launches] == ["cross_entropy.loss_kernel"]
    assert_good_code(launches, capability, stores=gradient)


@pytest.mark.parametrize(
    ("capability", "dropout_p", "num_tables"),
    cases(per_push=[(LEAST_SHARED_MEMORY, 0.1, 3)], nightly=product(CAPABILITIES, [0.0, 0.1], [2, 3])),
)
def test_embed_layer_norm(capability, dropout_p, num_tables):
    from megabert.kernels.embed_layer_norm import embed_layer_norm

    ids = [torch.zeros(64, dtype=torch.int64)] * num_tables
    tables = [leaf(32, 768, dtype=FP32) for _ in ids]
    weight, bias = leaf(768, dtype=FP32), leaf(768, dtype=FP32)

    def call():
        options = {"eps": 1e-12, "dropout_p": dropout_p, "low_precision": True}
        with torch.autocast("cpu", BF16):
            embed_layer_norm(ids, tables, weight, bias, **options).sum().backward()

    launches = launches_of(call)
    assert len(launches) == 2 + 2 * num_tables
    assert_good_code(launches, capability)
    assert_resident(launches[1], capability)


HEADS = [(16, 0.1), (32, 0.1), (64, 0.0), (64, 0.1), (128, 0.0), (128, 0.1)]


@pytest.mark.parametrize(
    ("capability", "head_dim", "dropout_p", "max_seqlen"),
    cases(
        per_push=[(LEAST_SHARED_MEMORY, 64, 0.1, 128), (LEAST_SHARED_MEMORY, 128, 0.1, 512)],
        nightly=[
            (capability, *head, longest) for capability, head, longest in product(CAPABILITIES, HEADS, [128, 512])
        ],
    ),
)
def test_attention(capability, head_dim, dropout_p, max_seqlen):
    from megabert.kernels.attention import plan_triton
    from megabert.model.ops import alibi_slopes
    from megabert.model.padding import Sequences

    sequences = Sequences(torch.tensor([0, 40, 64], dtype=torch.int32), max_seqlen)
    attend = plan_triton(sequences, alibi_slopes(12), head_dim)
    launches = launches_of(lambda: attend(leaf(64, 3, 12, head_dim), dropout_p).sum().backward())
    short = ["attention.short_kernel"] if max_seqlen == 128 and head_dim <= 64 else []
    backward = short or ["attention.query_kernel", "attention.key_kernel"]
    assert [launch.name for launch in launches] == ["attention.forward_kernel", *backward]
    assert_good_code(launches, capability, tensor_cores=[launch.name for launch in launches])


@pytest.mark.parametrize(
    ("capability", "head_dim", "dropout_p", "max_seqlen", "reach"),
    cases(
        per_push=[(LEAST_SHARED_MEMORY, 64, 0.0, 512, 64), (LEAST_SHARED_MEMORY, 64, 0.0, 512, None)],
        nightly=[
            (capability, *head, longest, reach)
            for capability, head, longest, reach in product(CAPABILITIES, HEADS, [128, 512], [64, None])
        ],
    ),
)
def test_attention_with_and_without_a_window_and_without_alibi(capability, head_dim, dropout_p, max_seqlen, reach):
    from megabert.kernels.attention import plan_triton
    from megabert.model.padding import Sequences

    sequences = Sequences(torch.tensor([0, 40, 64], dtype=torch.int32), max_seqlen)
    attend = plan_triton(sequences, None, head_dim, reach)
    launches = launches_of(lambda: attend(leaf(64, 3, 12, head_dim), dropout_p).sum().backward())
    assert_good_code(launches, capability, tensor_cores=[launch.name for launch in launches])


@pytest.mark.parametrize(
    ("capability", "head_dim"),
    cases(per_push=[(LEAST_SHARED_MEMORY, 64)], nightly=product(CAPABILITIES, [16, 32, 64, 128])),
)
def test_rotate(capability, head_dim):
    from megabert.kernels.rotate import rotate

    table = torch.zeros(64, 2, head_dim // 2)
    launches = launches_of(lambda: rotate(leaf(64, 3, 12, head_dim), table).sum().backward())
    assert [launch.name for launch in launches] == ["rotate.rotate_kernel"] * 2
    assert_good_code(launches, capability)
