"""BERT equals transformers' BERT, MosaicBERT equals the paper's equations: logits, loss, gradients, dropout."""

import pytest
import torch
import torch.nn.functional as F
from torch.utils.flop_counter import FlopCounterMode
from transformers import BertConfig, BertForMaskedLM, BertForSequenceClassification

from megabert.convert.weight_names import (
    add_classifiers_pooler,
    from_megabert,
    normalize_our_names,
    to_megabert,
)
from megabert.model.buckets import LONGEST_KEPT
from megabert.model.modeling_megabert import MegaBertForMaskedLM, MegaBertForSequenceClassification
from tests.model.helpers import reference
from tests.model.helpers.small import SMALL, documents, packed, padded, small_model

# A multiple of 3, 4, 8, 12 and 16 heads.
WIDE = {"hidden_size": 48}
BERT = {"position": "learned", "ffn": "gelu"}
TOLERANCES = [(torch.float64, 1e-10), (torch.float32, 1e-5)]


def hf_config(**changes) -> BertConfig:
    shape = SMALL | {"attention_probs_dropout_prob": 0.0, "num_labels": 3} | changes
    return BertConfig(**shape)


def hf_bert(ours: MegaBertForMaskedLM, config: BertConfig) -> BertForMaskedLM:
    """Build transformers' BERT with the weights of ours."""
    theirs = BertForMaskedLM(config).to(ours.decoder.bias.dtype)
    theirs.load_state_dict(from_megabert(ours.state_dict(), "bert"))
    return theirs


def assert_same_gradients(ours, theirs, tolerance: float) -> None:
    """Compare every gradient of a masked language model, by our names."""
    grads = {name: parameter.grad for name, parameter in theirs.named_parameters()}
    expected = to_megabert(grads, "bert").weights
    got = {name: parameter.grad for name, parameter in ours.named_parameters()}
    assert got.keys() == expected.keys()
    for name, grad in got.items():
        torch.testing.assert_close(
            grad, expected[name], rtol=tolerance, atol=tolerance, msg=lambda m, n=name: f"{n}: {m}"
        )


@pytest.mark.parametrize("padding", ["unpadded", "padded"])
@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize(("dtype", "tolerance"), TOLERANCES, ids=["fp64", "fp32"])
def test_bert_equals_transformers_masked_language_model(padding, attention, dtype, tolerance):
    if padding == "padded" and attention == "sdpa" and dtype == torch.float32:
        # PyTorch's fused attention sums in another order than its plain one.
        tolerance *= 2
    ours = small_model(padding=padding, **BERT).to(dtype)
    ours.config._attn_implementation = attention
    theirs = hf_bert(ours, hf_config())
    inputs = padded(documents())
    real = inputs["attention_mask"].bool()
    labels = torch.where(real, inputs["input_ids"], -100)
    got, expected = ours(**inputs, labels=labels), theirs(**inputs, labels=labels)
    torch.testing.assert_close(got.logits[real], expected.logits[real], rtol=tolerance, atol=tolerance)
    torch.testing.assert_close(got.loss, expected.loss, rtol=tolerance, atol=tolerance)
    got.loss.backward()
    expected.loss.backward()
    assert_same_gradients(ours, theirs, tolerance)


@pytest.mark.parametrize("where", ["right", "left", "holes"])
@pytest.mark.parametrize("padding", ["unpadded", "padded"])
def test_bert_equals_transformers_wherever_the_padding_is_and_with_pad_among_the_tokens(where, padding):
    """Every id may be anywhere, including that of [PAD], to whose row transformers' embedding gives no gradient."""
    ours = small_model(padding=padding, **BERT)
    theirs = hf_bert(ours, hf_config())
    generator = torch.Generator().manual_seed(5)
    ids = torch.randint(0, 4, (4, 9), generator=generator)
    place = torch.arange(9)
    length = torch.tensor([9, 1, 5, 8])[:, None]
    real = {"right": place < length, "left": place >= 9 - length, "holes": (place * 4) % 9 < length}[where]
    assert (ids[real] == ours.config.pad_token_id).any()
    inputs = {"input_ids": ids, "attention_mask": real.long(), "token_type_ids": torch.randint(0, 2, (4, 9))}
    labels = torch.where(real, ids, -100)
    got, expected = ours(**inputs, labels=labels), theirs(**inputs, labels=labels)
    torch.testing.assert_close(got.logits[real], expected.logits[real], rtol=0, atol=1e-10)
    got.loss.backward()
    expected.loss.backward()
    assert_same_gradients(ours, theirs, 1e-10)


@pytest.mark.parametrize(("dtype", "tolerance"), TOLERANCES, ids=["fp64", "fp32"])
def test_bert_equals_transformers_classifier(dtype, tolerance):
    """Logits, loss and every gradient of the encoder, the pooler and the classifier."""
    ours = small_model(MegaBertForSequenceClassification, num_labels=3, classifier_dropout=0.0, **BERT).to(dtype)
    theirs = BertForSequenceClassification(hf_config()).to(dtype)
    head = {name: tensor for name, tensor in small_model(**BERT).state_dict().items() if not name.startswith("bert.")}
    state = from_megabert(normalize_our_names(ours.state_dict()) | head, "bert")
    theirs.load_state_dict({name: tensor for name, tensor in state.items() if not name.startswith("cls.")})
    inputs, labels = padded(documents()), torch.tensor([0, 2, 1, 1, 0])
    got, expected = ours(**inputs, labels=labels), theirs(**inputs, labels=labels)
    torch.testing.assert_close(got.logits, expected.logits, rtol=tolerance, atol=tolerance)
    torch.testing.assert_close(got.loss, expected.loss, rtol=tolerance, atol=tolerance)
    got.loss.backward()
    expected.loss.backward()
    grads = to_megabert({name: parameter.grad for name, parameter in theirs.named_parameters()}, "bert").weights
    grads = add_classifiers_pooler(grads)
    for name, parameter in ours.named_parameters():
        torch.testing.assert_close(parameter.grad, grads[name], rtol=tolerance, atol=tolerance)


class Masks:
    """Replaces F.dropout: its n-th call applies the n-th mask, whatever the shape of its input."""

    def __init__(self):
        self.calls = 0

    def __call__(self, x, p=0.5, training=True, inplace=False):
        if not training or p == 0:
            return x
        self.calls += 1
        kept = torch.rand(x.numel(), generator=torch.Generator().manual_seed(self.calls)) >= p
        return x * kept.view(x.shape) / (1 - p)


def test_bert_drops_where_transformers_bert_drops(monkeypatch):
    """The same masks, applied in the order of the calls, give the same loss and gradients."""
    rates = {"hidden_dropout_prob": 0.3, "attention_probs_dropout_prob": 0.2}
    ours = small_model(**BERT, **rates).train()
    ours.config._attn_implementation = "eager"
    theirs = hf_bert(ours, hf_config(**rates, attn_implementation="eager")).train()
    ids = documents((9,))[0][None]
    outputs = []
    for model in (ours, theirs):
        masks = Masks()
        monkeypatch.setattr(F, "dropout", masks)
        outputs.append(model(ids, labels=ids))
        assert masks.calls == 1 + 3 * SMALL["num_hidden_layers"]
    torch.testing.assert_close(outputs[0].logits, outputs[1].logits, rtol=0, atol=1e-10)
    for output in outputs:
        output.loss.backward()
    assert_same_gradients(ours, theirs, 1e-10)


@pytest.mark.parametrize("num_heads", [3, 4, 8, 12, 16])
def test_mosaicbert_drops_where_the_paper_drops(monkeypatch, num_heads):
    """Dropout is after the embeddings' LayerNorm, after attention's output and on the gated product, nowhere else."""
    model = small_model(**WIDE, num_attention_heads=num_heads, hidden_dropout_prob=0.3).train()
    part = documents((9,))[0]
    monkeypatch.setattr(F, "dropout", ours := Masks())
    with torch.no_grad():
        got = model(**packed([part])).logits
        masks = Masks()
        expected = reference.logits(dict(model.state_dict()), part, 2, num_heads, drop=lambda x: masks(x, 0.3))
    assert ours.calls == masks.calls == 1 + 2 * SMALL["num_hidden_layers"]
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-10)


def test_biases_are_where_mosaicbert_has_them():
    model = small_model()
    biases = {name for name, _ in model.named_parameters() if name.endswith(".bias")}
    # mlp.up has none.
    layer = {"attention.qkv", "attention.out", "attention_norm", "mlp.down", "mlp_norm"}
    expected = {f"bert.encoder.layers.{i}.{name}.bias" for i in range(SMALL["num_hidden_layers"]) for name in layer}
    assert biases == expected | {
        "bert.embeddings.norm.bias",
        "transform.dense.bias",
        "transform.norm.bias",
        "decoder.bias",
    }


@pytest.mark.parametrize("num_heads", [3, 4, 8, 12, 16])
def test_every_gradient_of_mosaicbert_is_that_of_the_papers_equations(num_heads):
    model = small_model(**WIDE, num_attention_heads=num_heads)
    part = documents((9,))[0]
    labels = part.flip(0)
    F.cross_entropy(model(**packed([part])).logits, labels).backward()
    weights = {name: tensor.clone().requires_grad_() for name, tensor in model.state_dict().items()}
    F.cross_entropy(reference.logits(weights, part, 2, num_heads), labels).backward()
    for name, parameter in model.named_parameters():
        expected = weights[name].grad
        torch.testing.assert_close(parameter.grad, expected, rtol=0, atol=1e-10, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.parametrize("padding", ["unpadded", "padded"])
def test_the_padded_baseline_computes_its_padding(padding):
    """The linear layers' multiply-adds are those of real tokens, or of all documents at the longest one's length."""
    model = small_model(padding=padding)
    parts = documents()
    tokens = {"unpadded": sum(map(len, parts)), "padded": len(parts) * max(map(len, parts))}[padding]
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(**packed(parts))
    products = counter.get_flop_counts()["Global"]
    linear = sum(flops for operation, flops in products.items() if operation.__name__ in ("mm", "addmm"))
    width, ffn = SMALL["hidden_size"], SMALL["intermediate_size"]
    in_layers = SMALL["num_hidden_layers"] * (4 * width**2 + 3 * width * ffn) * tokens
    in_head = (width**2 + width * SMALL["vocab_size"]) * sum(map(len, parts))
    assert linear == 2 * (in_layers + in_head)


def test_the_padded_baseline_computes_no_rows_for_unused_places_of_documents():
    """A trainer's batch has more places than documents, all later ones empty; num_documents says where they begin."""
    model = small_model(padding="padded", **BERT)
    exact = packed(documents())
    tokens = len(exact["input_ids"])
    rows = torch.arange(0, tokens, 3)
    batch = exact | {"position_ids": torch.arange(tokens) % 12, "masked_positions": rows, "masked_labels": rows}
    unused = torch.full((20,), tokens, dtype=torch.int32)
    with_places = batch | {"cu_seqlens": torch.cat([batch["cu_seqlens"], unused]), "num_documents": len(documents())}

    def loss_and_flops(inputs: dict) -> tuple[torch.Tensor, int]:
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            return model(**inputs).loss_sum, counter.get_total_flops()

    (expected, needed), (got, computed) = loss_and_flops(batch), loss_and_flops(with_places)
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-12)
    assert computed == needed > 0


def test_the_last_layer_and_the_head_compute_masked_rows_only():
    model, inputs = small_model(), packed(documents())
    rows = torch.tensor([0, 3, 9, 20], dtype=torch.int32)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model.masked_loss(**inputs, position_ids=torch.zeros(0), masked_positions=rows, masked_labels=rows)
    products = counter.get_flop_counts()["Global"]
    linear = sum(flops for operation, flops in products.items() if operation.__name__ in ("mm", "addmm"))
    tokens, width, ffn = len(inputs["input_ids"]), SMALL["hidden_size"], SMALL["intermediate_size"]
    # Attention's output, the FFN.
    behind = width**2 + 3 * width * ffn
    # Two layers' query, key and value; all of the first layer.
    every = 2 * 3 * width**2 + behind
    assert linear == 2 * (tokens * every + len(rows) * (behind + width**2 + width * SMALL["vocab_size"]))


def test_a_model_trained_at_128_runs_at_2048():
    """ALiBi has no longest document, and the memory of a forward pass grows with the tokens."""
    model = small_model().float()
    assert LONGEST_KEPT < 2048

    def kept_bytes(lengths: tuple[int, ...]) -> int:
        seen: dict[int, int] = {}

        def pack(tensor: torch.Tensor) -> torch.Tensor:
            storage = tensor.untyped_storage()
            seen[storage.data_ptr()] = storage.nbytes()
            return tensor

        alive = []
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            alive.append(model(**packed(documents(lengths))).logits.sum())
        assert alive[0].isfinite()
        return sum(seen.values())

    kept_bytes((128,) * 4)
    one, two, four = (kept_bytes((2048,) * n) for n in (1, 2, 4))
    assert four - two == pytest.approx(2 * (two - one), rel=0.01)
    assert two < 2 * one
    # The length of the documents does not matter.
    assert kept_bytes((4096,)) == pytest.approx(two, rel=0.01)
