"""A whole model with the Triton operations equals one with PyTorch's: loss, correct rows and every gradient."""

import copy
from itertools import product

import pytest
import torch

from megabert.kernels import attention
from megabert.kernels.resolve import torch_ops, triton_ops
from megabert.model.configuration_megabert import MegaBertConfig
from megabert.model.layers import set_ops
from megabert.model.modeling_megabert import MegaBertForMaskedLM, MegaBertForSequenceClassification
from megabert.model.ops import IGNORE_INDEX
from tests.helpers.cases import cases
from tests.kernels.helpers import interpreter
from tests.kernels.helpers.yardstick import error
from tests.model.helpers.architectures import MODERNBERT

interpreter.install()

SHAPE = {
    "vocab_size": 90, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 48,
    "hidden_dropout_prob": 0.0, "max_position_embeddings": 160,
}  # fmt: skip
KINDS = {
    "mosaicbert": {},
    "mosaicbert, fp32 LayerNorm": {"layer_norm_dtype": "float32"},
    "bert": {"position": "learned", "ffn": "gelu", "layer_norm_dtype": "float32"},
    "padded": {"padding": "padded"},
    # A global and a local layer, with RoPE, and norms without bias before the sublayers.
    "modernbert": MODERNBERT | {"num_hidden_layers": 2},
}


def model_of(**more):
    torch.manual_seed(1)
    model = MegaBertForMaskedLM(MegaBertConfig(**SHAPE | more)).train()
    # Zeros and ones would hide errors.
    for parameter in model.parameters():
        parameter.data += 0.1 * torch.randn_like(parameter)
    return model


def batch(lengths):
    """A PackedBatch with an empty document at the end and a position without a label."""
    tokens = sum(lengths)
    cu_seqlens = torch.tensor([0, *lengths, 0]).cumsum(0, dtype=torch.int32)
    labels = torch.randint(90, (8,))
    labels[-1] = IGNORE_INDEX
    return {
        "input_ids": torch.randint(90, (tokens,)),
        "position_ids": torch.cat([torch.arange(n) for n in lengths]),
        "cu_seqlens": cu_seqlens,
        "max_seqlen": max(lengths),
        "masked_positions": torch.randperm(tokens)[:8].sort().values,
        "masked_labels": labels,
    }


def trained(model, ops, inputs, autocast=False):
    """Return the loss, the number of correct rows and the gradients of one step of a copy of the model."""
    model = copy.deepcopy(model)
    set_ops(model, ops)
    torch.manual_seed(3)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        loss = model(**inputs)
    loss.loss_sum.backward()
    gradients = {name: parameter.grad for name, parameter in model.named_parameters()}
    return loss.loss_sum.detach(), loss.num_correct, gradients


@pytest.mark.parametrize(
    ("kind", "lengths", "short"),
    cases(
        per_push=[("mosaicbert", [9, 1], 8)],
        nightly=product(KINDS, [[20, 1, 9], [130, 5]], [attention.SHORT]),
    ),
)
def test_equals_plain_pytorch_in_fp64(monkeypatch, kind, lengths, short):
    """short: the longest document that the kernels for short documents take."""
    monkeypatch.setattr(attention, "SHORT", short)
    model, inputs = model_of(**KINDS[kind]).double(), batch(lengths)
    loss, correct, gradients = trained(model, triton_ops(), inputs)
    expected, expected_correct, expected_gradients = trained(model, torch_ops(), inputs)
    assert error(loss, expected) < 1e-9
    assert correct == expected_correct
    assert gradients.keys() == expected_gradients.keys()
    for name, gradient in gradients.items():
        assert error(gradient, expected_gradients[name]) < 1e-6, name


@pytest.mark.parametrize(
    ("kind", "lengths"),
    cases(
        per_push=[("mosaicbert, fp32 LayerNorm", [5, 1, 2])],
        nightly=product(KINDS, [[20, 1, 9]]),
    ),
)
def test_errs_no_more_than_twice_as_much_under_autocast(kind, lengths):
    model, inputs = model_of(**KINDS[kind]), batch(lengths)
    exact, _, exact_gradients = trained(copy.deepcopy(model).double(), torch_ops(), inputs)
    loss, _, gradients = trained(model, triton_ops(), inputs, autocast=True)
    plain, _, plain_gradients = trained(model, torch_ops(), inputs, autocast=True)
    assert error(loss, exact) <= 2 * error(plain, exact) + 5e-4
    for name, gradient in gradients.items():
        assert gradient.dtype == plain_gradients[name].dtype == torch.float32
        # Both errors are random. The constant keeps the test from failing where PyTorch's happens to be tiny.
        allowed = 2 * error(plain_gradients[name], exact_gradients[name]) + 0.005
        assert error(gradient, exact_gradients[name]) <= allowed, name


ONE_LAYER_AND_TWO = cases(per_push=[(1, [5, 1, 2])], nightly=[(1, [5, 1, 2]), (2, [20, 1, 9])])


@pytest.mark.parametrize(("num_layers", "lengths"), ONE_LAYER_AND_TWO)
def test_activation_checkpointing_repeats_the_dropout(num_layers, lengths):
    """Recomputed layers draw the same masks: gradients have the same bits as without recomputing."""
    shape = {"num_hidden_layers": num_layers}
    model = model_of(hidden_dropout_prob=0.2, attention_probs_dropout_prob=0.2, **shape)
    inputs = batch(lengths)
    loss, _, gradients = trained(model, triton_ops(), inputs)
    model.bert.encoder.checkpoint_every = 1
    again, _, gradients_again = trained(model, triton_ops(), inputs)
    assert torch.equal(loss, again)
    assert all(torch.equal(gradients[name], gradients_again[name]) for name in gradients)
    without_dropout = model_of(**shape)
    set_ops(without_dropout, triton_ops())
    assert not torch.equal(loss, without_dropout(**inputs).loss_sum), "dropout is on"


def test_a_batch_of_rows_equals_plain_pytorch():
    """Fine-tuning calls the model so: (B, S) with a mask, and a pooler on each first token."""
    torch.manual_seed(1)
    model = MegaBertForSequenceClassification(MegaBertConfig(**SHAPE, num_labels=3)).eval().double()
    mask = torch.ones(3, 12, dtype=torch.long)
    mask[1, 5:] = mask[2, 1:] = 0
    inputs = {"input_ids": torch.randint(90, (3, 12)), "attention_mask": mask, "labels": torch.tensor([0, 2, 1])}
    set_ops(model, torch_ops())
    expected = model(**inputs)
    set_ops(model, triton_ops())
    got = model(**inputs)
    assert error(got.logits, expected.logits) < 1e-9
    assert error(got.loss, expected.loss) < 1e-9


@pytest.mark.parametrize(("num_layers", "lengths"), ONE_LAYER_AND_TWO)
def test_torch_compile_sees_one_graph(num_layers, lengths):
    model, inputs = model_of(num_hidden_layers=num_layers).double(), batch(lengths)
    expected, _, expected_gradients = trained(model, torch_ops(), inputs)
    set_ops(model, triton_ops())
    loss = torch.compile(model, fullgraph=True, backend="aot_eager")(**inputs).loss_sum
    loss.backward()
    assert error(loss.detach(), expected) < 1e-9
    for name, parameter in model.named_parameters():
        assert error(parameter.grad, expected_gradients[name]) < 1e-6, name
