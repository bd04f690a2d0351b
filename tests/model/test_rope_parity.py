"""ModernBERT and RoPE-MosaicBERT equal transformers' ModernBERT and GTE: logits, losses, states and every gradient."""

from itertools import product

import pytest
import torch
import torch.nn.functional as F
import transformers
from torch.utils.flop_counter import FlopCounterMode
from transformers import GteForMaskedLM, GteModel, ModernBertForMaskedLM, ModernBertModel

from megabert.model import modeling_megabert as modeling
from megabert.model.attention import PLANNERS
from megabert.model.padding import Sequences
from tests.helpers.cases import cases
from tests.model.helpers.architectures import (
    ARCHITECTURES,
    exact_rope,  # noqa: F401
    our_gradients,
    their_gradients,
    their_model,
)
from tests.model.helpers.small import SMALL, documents, packed, padded, small_model

KINDS = {
    "modernbert": ("modernbert", ModernBertForMaskedLM, ModernBertModel),
    "rope-mosaicbert": ("gte", GteForMaskedLM, GteModel),
}
# ROPE needs an even head size; the window sees 4 tokens on each side.
EVEN = {"num_attention_heads": 2, "hidden_size": 24}
# Shorter than, as long as and longer than the window of 9 tokens; 70 tokens fill more than one block.
LENGTHS = {"short": (1, 2, 4), "window": (5, 9), "long": (10, 70, 33)}
TOLERANCES = {torch.float64: 1e-10, torch.float32: 1e-5}

pytestmark = pytest.mark.usefixtures("exact_rope")


def model_of(architecture: str, cls=modeling.MegaBertForMaskedLM, dtype=torch.float64, **changes):
    return small_model(cls, **(EVEN | ARCHITECTURES[architecture] | changes)).to(dtype)


def assert_close(got, expected, tolerance, what=""):
    torch.testing.assert_close(got, expected, rtol=tolerance, atol=tolerance, msg=lambda text: f"{what}: {text}")


def assert_same_gradients(ours, theirs, kind, tolerance):
    expected = their_gradients(theirs)
    got = our_gradients(ours, kind, set(expected))
    assert got.keys() == expected.keys()
    largest = max(float(grad.abs().max()) for grad in expected.values())
    for name, grad in expected.items():
        torch.testing.assert_close(
            got[name], grad, rtol=tolerance, atol=tolerance * max(1.0, largest), msg=lambda m, n=name: f"{n}: {m}"
        )


@pytest.mark.parametrize(
    ("architecture", "lengths", "attention", "padding", "dtype"),
    cases(
        per_push=[
            ("modernbert", "long", "sdpa", "unpadded", torch.float64),
            ("modernbert", "window", "eager", "padded", torch.float32),
            ("rope-mosaicbert", "long", "sdpa", "padded", torch.float64),
        ],
        nightly=product(KINDS, LENGTHS, ["eager", "sdpa"], ["unpadded", "padded"], TOLERANCES),
    ),
)
def test_masked_language_model(architecture, lengths, attention, padding, dtype):
    (kind, cls, _), tolerance = KINDS[architecture], TOLERANCES[dtype]
    ours = model_of(architecture, dtype=dtype, padding=padding)
    ours.config._attn_implementation = attention
    theirs = their_model(cls, ours, kind)
    inputs = padded(documents(LENGTHS[lengths]))
    real = inputs["attention_mask"].bool()
    labels = torch.where(real, inputs["input_ids"], -100)
    got = ours(**inputs, labels=labels, output_hidden_states=True)
    expected = theirs(**inputs, labels=labels, output_hidden_states=True)
    assert_close(got.logits[real], expected.logits[real], tolerance, "logits")
    # transformers' ModernBERT converts logits to fp32 before its loss, in an fp64 model, too.
    exact = F.cross_entropy(expected.logits[real], labels[real])
    assert_close(got.loss, exact, tolerance, "loss")
    assert_close(got.loss.float(), expected.loss.float(), 1e-5, "transformers' loss")
    assert len(got.hidden_states) == len(expected.hidden_states)
    for layer, (mine, state) in enumerate(zip(got.hidden_states, expected.hidden_states, strict=True)):
        assert_close(mine[real], state[real], tolerance, f"state {layer}")
    got.loss.backward()
    exact.backward()
    assert_same_gradients(ours, theirs, kind, tolerance)


@pytest.mark.parametrize("architecture", KINDS)
def test_packed_documents_are_transformers_rows(architecture):
    kind, cls, _ = KINDS[architecture]
    ours = model_of(architecture)
    theirs = their_model(cls, ours, kind).eval()
    parts = documents((70, 1, 9, 33))
    with torch.no_grad():
        got = ours(**packed(parts)).logits.split([len(part) for part in parts])
        for part, mine in zip(parts, got, strict=True):
            assert_close(mine, theirs(part[None]).logits[0], 1e-10)
            assert (ours(**packed([part])).logits - mine).abs().max() < 1e-12


@pytest.mark.parametrize("architecture", KINDS)
def test_bare_model(architecture):
    kind, _, cls = KINDS[architecture]
    ours = model_of(architecture)
    bare = modeling.MegaBertModel(ours.config, add_pooling_layer=False).double()
    bare.load_state_dict(ours.bert.state_dict())
    theirs = their_model(cls, ours, kind).eval()
    inputs = padded(documents((5, 40)))
    real = inputs["attention_mask"].bool()
    with torch.no_grad():
        got, expected = bare(**inputs).last_hidden_state, theirs(**inputs).last_hidden_state
    assert_close(got[real], expected[real], 1e-10)


HEADS = {
    "SequenceClassification": {"labels": torch.tensor([0, 2, 1])},
    "TokenClassification": {},
    "QuestionAnswering": {"start_positions": torch.tensor([0, 1, 0]), "end_positions": torch.tensor([0, 3, 8])},
}


@pytest.mark.parametrize(
    ("head", "pooling", "dtype"),
    cases(
        per_push=product(HEADS, ["cls"], [torch.float64]),
        nightly=[*product(HEADS, ["cls"], TOLERANCES), *product(["SequenceClassification"], ["mean"], TOLERANCES)],
    ),
)
def test_heads_of_modernbert(head, pooling, dtype):
    tolerance, labels = TOLERANCES[dtype], 2 if head == "QuestionAnswering" else 3
    cls = getattr(modeling, f"MegaBertFor{head}")
    ours = model_of("modernbert", cls, dtype, num_labels=labels, classifier_pooling=pooling)
    theirs = their_model(getattr(transformers, f"ModernBertFor{head}"), ours, "modernbert")
    inputs = padded(documents((1, 5, 20)))
    real = inputs["attention_mask"].bool()
    targets = HEADS[head] or {"labels": torch.where(real, inputs["input_ids"] % 3, -100)}
    if head == "QuestionAnswering":
        # transformers' scores of padding are not 0, so that rows without padding are compared.
        inputs = padded(documents((20, 20, 20)))
    got, expected = ours(**inputs, **targets), theirs(**inputs, **targets)
    assert_close(got.loss, expected.loss, tolerance, "loss")
    got.loss.backward()
    expected.loss.backward()
    assert_same_gradients(ours, theirs, "modernbert", tolerance)


@pytest.mark.parametrize("length", [1, 2, pytest.param(8192, marks=pytest.mark.nightly)])
@pytest.mark.parametrize("architecture", KINDS)
def test_lengths_of_1_2_and_8192(architecture, length):
    kind, cls, _ = KINDS[architecture]
    ours = model_of(architecture, num_hidden_layers=2)
    if architecture == "modernbert":
        ours = model_of(architecture, num_hidden_layers=2, local_attention_window=128)
    theirs = their_model(cls, ours, kind).eval()
    part = torch.randint(5, SMALL["vocab_size"], (length,))
    with torch.no_grad():
        assert_close(ours(**packed([part])).logits, theirs(part[None]).logits[0], 1e-10)


def test_parameters_of_modernbert_are_transformers():
    ours = model_of("modernbert")
    theirs = their_model(ModernBertForMaskedLM, ours, "modernbert")
    assert sum(x.numel() for x in ours.parameters()) == sum(x.numel() for x in theirs.parameters())
    assert not [name for name, _ in ours.named_parameters() if name.endswith("bias") and name != "decoder.bias"]


def test_local_attention_computes_in_proportion_to_the_tokens():
    """Twice the tokens take twice the products, forward and backward; global attention takes four times as many."""

    def products(tokens: int, reach: int | None) -> int:
        sequences = Sequences(torch.tensor([0, tokens], dtype=torch.int32), tokens)
        qkv = torch.randn(tokens, 3, 1, 16, requires_grad=True)
        with FlopCounterMode(display=False) as counter:
            PLANNERS["sdpa"](sequences, None, 16, reach)(qkv, 0.0).sum().backward()
        return counter.get_total_flops()

    assert products(2048, 64) == 2 * products(1024, 64)
    assert products(2048, None) == 4 * products(1024, None)
    assert products(2048, 64) < products(2048, None) / 10
