"""The kernels on a GPU: the same comparisons at training's sizes, the same bits twice, and faster than eager PyTorch.

`python tests/benchmarks/bench_kernels.py` prints the times.
"""

import pytest
import torch

from megabert.kernels.resolve import inspect_machine, resolve, torch_ops
from megabert.model.attention import PLANNERS, plan_eager
from megabert.model.configuration_megabert import MegaBertConfig
from megabert.model.layers import set_ops
from megabert.model.modeling_megabert import MegaBertForMaskedLM
from megabert.model.ops import alibi_slopes, rope_table
from megabert.model.padding import Sequences
from tests.kernels.helpers.yardstick import assert_as_good, error, results

pytestmark = [pytest.mark.gpu, pytest.mark.triton]

# Not by looking for the module: flash-attn-4 has a folder of that name, without these functions.
needs_flash = pytest.mark.skipif(
    not torch.cuda.is_available() or inspect_machine(torch.device("cuda")).lacks("flash_attn"),
    reason="needs flash-attn: bash launch/install_gpu.sh",
)

BF16 = torch.bfloat16
TOKENS, MASKED, HIDDEN, WIDTH, VOCAB = 4096, 1000, 768, 3072, 30_528
# Of BERT's own tokenizer: rows of the logits are not aligned for the widest loads.
BERT_VOCAB = 30_522


@pytest.fixture
def cuda():
    return torch.device("cuda")


@pytest.fixture
def ops():
    from megabert.kernels.resolve import triton_ops

    return triton_ops()


def drawn(*shape, dtype=torch.float32):
    return torch.randn(shape, device="cuda").to(dtype)


def weight_and_bias():
    return [1 + drawn(HIDDEN) / 4, drawn(HIDDEN)]


def add_norm(ops, **options):
    """Return a function of add_layer_norm's inputs that stacks both results, so that their gradients differ."""
    return lambda *inputs: torch.stack(ops.add_layer_norm(*inputs, **options))


def test_geglu(ops):
    assert_as_good(
        lambda x: ops.geglu(x, 0.0), lambda x: torch_ops().geglu(x, 0.0), [drawn(TOKENS, 2 * WIDTH, dtype=BF16)]
    )


@pytest.mark.parametrize("low_precision", [True, False])
def test_add_layer_norm(ops, low_precision):
    options = {"eps": 1e-12, "dropout_p": 0.0, "low_precision": low_precision}
    inputs = [drawn(TOKENS, HIDDEN, dtype=BF16), drawn(TOKENS, HIDDEN, dtype=BF16), *weight_and_bias()]
    mine, plain = (add_norm(x, **options) for x in (ops, torch_ops()))
    assert_as_good(mine, plain, inputs, autocast=True)


@pytest.mark.parametrize("vocab", [VOCAB, BERT_VOCAB])
def test_embed_layer_norm(ops, vocab):
    options = {"eps": 1e-12, "dropout_p": 0.0, "low_precision": True}
    ids = [torch.randint(rows, (TOKENS,), device="cuda") for rows in (vocab, 2)]

    def embed(module):
        return lambda words, types, *norm: module.embed_layer_norm(ids, [words, types], *norm, **options)

    inputs = [drawn(vocab, HIDDEN), drawn(2, HIDDEN), *weight_and_bias()]
    assert_as_good(embed(ops), embed(torch_ops()), inputs, autocast=True)


@pytest.mark.parametrize("vocab", [VOCAB, BERT_VOCAB])
def test_masked_cross_entropy(ops, vocab):
    labels = torch.randint(vocab, (MASKED,), device="cuda")
    labels[::7] = -100

    def loss(module):
        return lambda *inputs: module.masked_cross_entropy(*inputs, labels).loss_sum

    inputs = [drawn(MASKED, HIDDEN, dtype=BF16), drawn(vocab, HIDDEN) / 30, drawn(vocab) / 4]
    assert_as_good(loss(ops), loss(torch_ops()), inputs, autocast=True)


@pytest.mark.parametrize("size", [16, 32, 64, 128])
@pytest.mark.parametrize(
    "lengths", [[128, 37, 0, 1, 90], [512, 0, 1, 300, 77], [1024, 1000, 1]], ids=["short", "long", "longest"]
)
@pytest.mark.parametrize("planner", ["Triton", pytest.param("flash-attn", marks=needs_flash)])
def test_attention(ops, size, lengths, planner):
    plan = ops.attention if planner == "Triton" else PLANNERS["flash_attention_2"]
    sequences = Sequences(torch.tensor([0, *lengths], device="cuda").cumsum(0, dtype=torch.int32), max(lengths))
    slopes = alibi_slopes(4).cuda()

    def plain(qkv):
        return plan_eager(sequences, slopes.to(qkv.dtype), size)(qkv, 0.0)

    assert_as_good(
        lambda qkv: plan(sequences, slopes, size)(qkv, 0.0), plain, [drawn(sum(lengths), 3, 4, size, dtype=BF16)]
    )


@pytest.mark.parametrize("reach", [64, None])
@pytest.mark.parametrize("lengths", [[128, 37, 0, 1, 90], [1024, 1000, 1]], ids=["short", "long"])
@pytest.mark.parametrize("planner", ["Triton", pytest.param("flash-attn", marks=needs_flash)])
def test_attention_of_modernbert(ops, lengths, planner, reach):
    """Without ALiBi; local layers see 64 tokens on each side."""
    plan = ops.attention if planner == "Triton" else PLANNERS["flash_attention_2"]
    sequences = Sequences(torch.tensor([0, *lengths], device="cuda").cumsum(0, dtype=torch.int32), max(lengths))
    mine, plain = (lambda qkv, plan=plan: plan(sequences, None, 64, reach)(qkv, 0.0) for plan in (plan, plan_eager))
    assert_as_good(mine, plain, [drawn(sum(lengths), 3, 4, 64, dtype=BF16)])


def test_rotate(ops):
    table = rope_table(torch.arange(TOKENS, device="cuda"), 64, 160_000.0)
    mine, plain = (lambda qkv, use=use: use.rotate(qkv, table) for use in (ops, torch_ops()))
    assert_as_good(mine, plain, [drawn(TOKENS, 3, 12, 64, dtype=BF16)])


@pytest.mark.parametrize("length", [128, 1024])
def test_attention_to_padded_rows(ops, length):
    bounds = torch.arange(0, 4 * length, length, device="cuda", dtype=torch.int32)
    keys = torch.tensor([length, length - 29, 1], device="cuda", dtype=torch.int32)
    rows, slopes = Sequences(bounds, length, num_keys=keys), alibi_slopes(4).cuda()

    def plain(qkv):
        return plan_eager(rows, slopes.to(qkv.dtype), 64)(qkv, 0.0)

    qkv = drawn(3 * length, 3, 4, 64, dtype=BF16)
    assert_as_good(lambda qkv: ops.attention(rows, slopes, 64)(qkv, 0.0), plain, [qkv])


@pytest.mark.parametrize("size", [64, 128])
@pytest.mark.parametrize("lengths", [[128, 37], [300, 77], [1024]], ids=["short", "long", "longest"])
def test_attention_drops_the_same_weights_forward_and_backward(ops, lengths, size):
    from megabert.kernels.dropout import draw_seed
    from tests.kernels.helpers.masked_attention import masked_attention, masks_of

    sequences = Sequences(torch.tensor([0, *lengths], device="cuda").cumsum(0, dtype=torch.int32), max(lengths))
    slopes, qkv = alibi_slopes(4).cuda(), drawn(sum(lengths), 3, 4, size, dtype=BF16)
    torch.manual_seed(5)
    masks = masks_of(lengths, 4, 0.1, draw_seed(qkv, 0.1))

    def fused(qkv):
        torch.manual_seed(5)
        return ops.attention(sequences, slopes, size)(qkv, 0.1)

    assert_as_good(fused, masked_attention(slopes, size, masks, 0.1), [qkv])


def test_dropout_repeats_and_differs(ops):
    x = drawn(TOKENS, 2 * WIDTH, dtype=BF16)
    torch.manual_seed(1)
    first, other = ops.geglu(x, 0.1), ops.geglu(x, 0.1)
    torch.manual_seed(1)
    assert torch.equal(ops.geglu(x, 0.1), first)
    assert not torch.equal(first, other)
    assert abs((first == 0).double().mean().item() - 0.1) < 0.001


def test_gradients_are_the_same_bits_twice(ops):
    sequences = Sequences(torch.tensor([0, 300, 812, 813, 1300], device="cuda", dtype=torch.int32), 512)
    attend = ops.attention(sequences, alibi_slopes(12).cuda(), 64)
    qkv, upstream = drawn(1300, 3, 12, 64, dtype=BF16), drawn(1300, 12, 64, dtype=BF16)
    once, twice = (results(lambda x: attend(x, 0.0), [qkv], upstream) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(once, twice, strict=True))
    ids = [torch.randint(50, (TOKENS,), device="cuda")]
    options = {"eps": 1e-12, "dropout_p": 0.0, "low_precision": True}
    inputs, upstream = [drawn(VOCAB, HIDDEN), *weight_and_bias()], drawn(TOKENS, HIDDEN)

    def embed(table, weight, bias):
        return ops.embed_layer_norm(ids, [table], weight, bias, **options)

    once, twice = (results(embed, inputs, upstream) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(once, twice, strict=True))


@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
@pytest.mark.parametrize("checkpoint_every", [0, 1])
def test_a_model_trains_the_same(cuda, compiled, checkpoint_every):
    """Five steps of AdamW under bf16 autocast give the same losses with resolve()'s choice and with plain PyTorch."""
    losses = {}
    for name in ("auto", "torch"):
        torch.manual_seed(0)
        config = MegaBertConfig(num_hidden_layers=2, hidden_dropout_prob=0.0, vocab_size=1024)
        model = MegaBertForMaskedLM(config).cuda().train()
        model.bert.encoder.checkpoint_every = checkpoint_every
        set_ops(model, resolve(name, cuda, config, bf16=True))
        run = torch.compile(model) if compiled and name == "auto" else model
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
        batch = {
            "input_ids": torch.randint(1024, (512,), device="cuda"),
            "position_ids": torch.arange(128, device="cuda").repeat(4),
            "cu_seqlens": torch.tensor([0, 128, 256, 384, 512, 512], device="cuda", dtype=torch.int32),
            "max_seqlen": 128,
            "masked_positions": torch.arange(0, 512, 4, device="cuda"),
            "masked_labels": torch.randint(1024, (128,), device="cuda"),
        }
        losses[name] = []
        for _ in range(5):
            with torch.autocast("cuda", BF16):
                loss = run(**batch).loss_sum / 128
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            losses[name].append(loss.detach())
    assert error(torch.stack(losses["auto"]), torch.stack(losses["torch"]).double()) < 0.01
    assert losses["auto"][-1] < losses["auto"][0]


@pytest.mark.parametrize(
    "operation",
    ["geglu", "add_layer_norm", "embed_layer_norm", "masked_cross_entropy", "attention_128", "attention_512"],
)
def test_faster_than_eager(operation):
    from tests.benchmarks.bench_kernels import contenders, time_s

    found = contenders(torch.device("cuda"))[operation]
    times = {name: time_s(found[name], 10) for name in ("Triton", "eager")}
    assert times["Triton"] < times["eager"], times
