"""The model and its heads: sizes, packing, pooling, losses, arguments, precision."""

from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import DataCollatorWithFlattening

from megabert.model.configuration_megabert import MegaBertConfig
from megabert.model.modeling_megabert import (
    MegaBertForMaskedLM,
    MegaBertForQuestionAnswering,
    MegaBertForSequenceClassification,
    MegaBertForTokenClassification,
    MegaBertModel,
)
from megabert.model.ops import MaskedLoss, alibi_slopes
from tests.model.helpers import reference
from tests.model.helpers.architectures import ARCHITECTURES, architectures
from tests.model.helpers.small import SMALL, documents, packed, padded, small_model


@pytest.mark.parametrize(
    ("changes", "parameters"),
    [
        ({}, 137_400_384),
        (
            {"num_hidden_layers": 24, "hidden_size": 1024, "num_attention_heads": 16, "intermediate_size": 4096},
            435_221_312,
        ),
        ({"vocab_size": 30_522, "position": "learned", "ffn": "gelu"}, 109_514_298),
        (
            {"num_hidden_layers": 24, "hidden_size": 1024, "num_attention_heads": 16, "intermediate_size": 4096}
            | {"vocab_size": 30_522, "position": "learned", "ffn": "gelu"},
            335_174_458,
        ),
    ],
    ids=["mosaicbert-base", "mosaicbert-large", "bert-base", "bert-large"],
)
def test_parameter_counts_are_the_published_ones(changes, parameters):
    with torch.device("meta"):
        model = MegaBertForMaskedLM(MegaBertConfig(**changes))
    model.tie_weights()
    assert sum(parameter.numel() for parameter in model.parameters()) == parameters


@pytest.mark.parametrize("num_heads", [4, 8, 12, 16])
def test_alibi_slopes(num_heads):
    assert alibi_slopes(num_heads).tolist() == pytest.approx(reference.slopes(num_heads), rel=1e-7)
    # The published values.
    if num_heads == 12:
        assert alibi_slopes(12)[8:].tolist() == pytest.approx([0.70710678, 0.35355339, 0.1767767, 0.08838835], rel=1e-7)


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("num_heads", [3, 4, 8, 12, 16])
def test_mosaicbert_equals_the_papers_equations(attention, num_heads):
    model = small_model(hidden_size=48, num_attention_heads=num_heads).eval()
    model.config._attn_implementation = attention
    parts = documents()
    with torch.no_grad():
        got = model(**packed(parts)).logits.split([len(part) for part in parts])
        for part, rows in zip(parts, got, strict=True):
            expected = reference.logits(dict(model.state_dict()), part, 2, num_heads)
            torch.testing.assert_close(rows, expected, rtol=0, atol=1e-10)


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("padding", ["unpadded", "padded"])
@architectures("mosaicbert", "bert", "modernbert", "neighbors")
def test_packing_is_invisible(attention, padding, architecture):
    """A document's states are the same alone, anywhere in a bin, in a padded batch, and if padding is computed."""
    model = small_model(MegaBertModel, padding=padding, **ARCHITECTURES[architecture]).eval()
    model.config._attn_implementation = attention
    parts = documents()
    with torch.no_grad():
        alone = [model(part[None]).last_hidden_state[0] for part in parts]
        together = model(**packed(parts)).last_hidden_state.split([len(part) for part in parts])
        reversed_order = model(**packed(parts[::-1])).last_hidden_state.split([len(part) for part in parts[::-1]])[::-1]
        rows = model(**padded(parts)).last_hidden_state
    for index, part in enumerate(parts):
        for other in (together[index], reversed_order[index], rows[index, : len(part)]):
            torch.testing.assert_close(other, alone[index], rtol=0, atol=1e-12)
    assert not rows[0, len(parts[0]) :].any()


class Selections(TorchDispatchMode):
    """Counts the copies of rows."""

    count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += func is torch.ops.aten.index_select.default
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("rows", [0, 2])
@pytest.mark.parametrize(
    "changes", [{}, {"embedding_neighbors": 2}, {"local_attention_window": 4, "global_attention_every": 2}]
)
def test_a_batch_without_a_token_gives_zeros(rows, changes):
    inputs = padded(documents()[:rows] or documents())
    inputs = {name: values[:rows] for name, values in inputs.items()}
    inputs["attention_mask"] = torch.zeros_like(inputs["attention_mask"])
    logits = small_model(**changes)(**inputs).logits
    assert logits.shape == (*inputs["input_ids"].shape, 60)
    assert not logits.any()


def test_the_padded_baseline_copies_no_layers_states_for_nobody():
    """Copies of every layer's states once took 8 % of the memory of a step of bert-base."""
    counts = []
    for layers in (2, 5):
        model = small_model(padding="padded", num_hidden_layers=layers)
        with Selections() as selections:
            model(**packed(documents()))
        counts.append(selections.count)
    assert counts[0] == counts[1] > 0


def test_empty_documents_are_legal():
    model = small_model().eval()
    inputs = packed(documents())
    end = inputs["cu_seqlens"][-1:]
    longer = inputs | {"cu_seqlens": torch.cat([inputs["cu_seqlens"], end, end])}
    with torch.no_grad():
        for attention in ("eager", "sdpa"):
            model.config._attn_implementation = attention
            torch.testing.assert_close(model(**longer).logits, model(**inputs).logits, rtol=0, atol=1e-14)


@pytest.mark.parametrize("pooling", ["cls", "mean"])
@pytest.mark.parametrize("every_layer", [False, True])
def test_an_empty_document_is_pooled_as_a_hidden_state_of_zeros(pooling, every_layer):
    """Empty documents stand before, between and after the others; in packed and padded batches, and alone."""
    model = small_model(MegaBertForSequenceClassification, classifier_pooling=pooling, num_labels=3).eval()
    bounds = torch.tensor([0, 0, 4, 4, 9, 9], dtype=torch.int32)
    ids = torch.arange(5, 14)
    rows, mask = torch.zeros(5, 6, dtype=torch.long), torch.zeros(5, 6, dtype=torch.long)
    for row, part in ((1, ids[:4]), (3, ids[4:])):
        rows[row, : len(part)], mask[row, : len(part)] = part, 1
    with torch.no_grad():
        nothing = model.get_submodule("classifier")(
            model.get_submodule("pre_classifier")(torch.zeros(1, SMALL["hidden_size"], dtype=torch.float64))
        )
        alone = [model(part[None]).logits for part in (ids[:4], ids[4:])]
        expected = torch.cat([nothing, alone[0], nothing, alone[1], nothing])
        more = {"output_hidden_states": every_layer}
        for got in (model(ids, cu_seqlens=bounds, **more), model(rows, attention_mask=mask, **more)):
            torch.testing.assert_close(got.logits, expected, rtol=0, atol=1e-12)
        only = model(rows, attention_mask=mask * 0, **more).logits
        torch.testing.assert_close(only, nothing.expand(5, -1), rtol=0, atol=1e-12)
        encoder = small_model(MegaBertModel).eval()
        pooled = encoder(rows, attention_mask=mask).pooler_output
        assert torch.equal(pooled[0], pooled[2])
        assert torch.equal(pooled[0], encoder.get_submodule("pooler")(torch.zeros_like(pooled[0])))


@pytest.mark.parametrize(
    "arguments",
    [{"output_attentions": True}, {"head_mask": torch.ones(3)}, {}],
)
@pytest.mark.parametrize("cls", [MegaBertModel, MegaBertForMaskedLM, MegaBertForQuestionAnswering])
def test_unsupported_arguments_are_an_error(cls, arguments):
    with pytest.raises(ValueError, match=next(iter(arguments), "input_ids is missing")):
        small_model(cls)(**arguments)
    small_model(cls)(torch.ones(1, 4, dtype=torch.long), output_attentions=False, num_items_in_batch=3)


@pytest.mark.parametrize("cls", [MegaBertForTokenClassification, MegaBertForQuestionAnswering])
def test_packed_tokens_are_refused_by_heads_that_read_rows_only(cls):
    """They would take the documents for one."""
    with pytest.raises(ValueError, match="cu_seqlens: this head reads rows with an attention_mask, no packed tokens"):
        small_model(cls)(torch.ones(1, 4, dtype=torch.long), cu_seqlens=torch.tensor([0, 2, 4]))
    for model in (small_model(), small_model(cls)):
        with pytest.raises(ValueError, match=r"cu_seq_lens_q: pass packed tokens as \(tokens,\) with cu_seqlens"):
            model(torch.ones(1, 4, dtype=torch.long), cu_seq_lens_q=torch.tensor([0, 2, 4]), max_length_q=2)


@pytest.mark.parametrize("options", [{}, {"return_flash_attn_kwargs": True}, {"return_seq_idx": True}])
@pytest.mark.parametrize("start", [0, 2])
def test_flattened_documents_are_refused_since_they_would_attend_to_each_other(options, start):
    collator = DataCollatorWithFlattening(position_ids_start=start, **options)
    batch: Any = collator([{"input_ids": [2, 7, 8, 3]}, {"input_ids": [2, 9, 3]}, {"input_ids": [2]}])
    model = small_model().eval()
    with pytest.raises(ValueError, match="packed tokens as \\(tokens,\\) with cu_seqlens"):
        model(**batch)
    ids, places = batch["input_ids"], batch["position_ids"]
    with pytest.raises(ValueError, match="begin anew within a row"):
        model(ids, position_ids=places)
    packed = model(ids[0], cu_seqlens=torch.tensor([0, 4, 7, 8])).logits
    torch.testing.assert_close(packed[4:7], model(ids[:, 4:7]).logits[0], rtol=0, atol=1e-12)
    assert model(ids, torch.ones_like(ids), position_ids=places).logits.isfinite().all()
    single = DataCollatorWithFlattening()([{"input_ids": [2, 7, 8, 3]}])
    assert torch.equal(model(**single).logits, model(single["input_ids"]).logits)


def test_a_text_beyond_the_learned_positions_is_refused_but_padding_there_is_not():
    model = small_model(position="learned", ffn="gelu", max_position_embeddings=8).eval()
    ids = torch.full((2, 10), 7)
    with pytest.raises(
        ValueError, match="a text has 10 tokens, but the model has learned the positions of 8: truncate"
    ):
        model(ids)
    mask = torch.ones_like(ids)
    mask[:, 8:] = 0
    assert torch.equal(model(ids, mask).logits[:, :8], model(ids[:, :8]).logits)
    repeated = torch.arange(10)[None] % 8
    assert model(ids, torch.ones_like(ids), position_ids=repeated).logits.isfinite().all()


def test_positions_of_answers_may_be_a_column():
    model = small_model(MegaBertForQuestionAnswering).eval()
    ids, start, end = torch.arange(5, 17).view(2, 6), torch.tensor([1, 9]), torch.tensor([3, 2])
    flat = model(ids, start_positions=start, end_positions=end).loss
    assert torch.equal(model(ids, start_positions=start[:, None], end_positions=end[:, None]).loss, flat)


def test_masked_rows_give_the_loss_and_gradients_of_all_rows():
    """Computing the last layer and the head on masked tokens only changes nothing."""
    inputs = packed(documents())
    positions = torch.tensor([0, 3, 9, 20, 0, 0], dtype=torch.int32)
    labels = torch.tensor([11, 12, 13, 14, -100, -100], dtype=torch.int32)
    sparse, dense = small_model(), small_model()
    got = sparse.masked_loss(
        inputs["input_ids"], torch.zeros(0), inputs["cu_seqlens"], inputs["max_seqlen"], positions, labels
    )
    assert isinstance(got, MaskedLoss)
    got.loss_sum.backward()
    every = torch.full_like(inputs["input_ids"], -100)
    every[positions[:4].long()] = labels[:4].long()
    output = dense(**inputs, labels=every)
    (output.loss * 4).backward()
    torch.testing.assert_close(got.loss_sum, output.loss * 4, rtol=0, atol=1e-10)
    assert int(got.num_targets) == 4
    for (name, a), b in zip(sparse.named_parameters(), dense.parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad, rtol=0, atol=1e-10, msg=name)


def test_slopes_are_made_once_and_serve_training_after_inference_mode():
    model = small_model()
    inputs = packed(documents())
    with torch.inference_mode():
        model(**inputs)
    (first,) = model.bert.encoder.slopes.values()
    model(**inputs).logits.sum().backward()
    assert model.bert.encoder.slopes == {(torch.float64, torch.device("cpu")): first}
    model.float()(**inputs)
    assert len(model.bert.encoder.slopes) == 2


def test_every_head_runs_on_padded_rows():
    inputs = padded(documents())
    batch, length = inputs["input_ids"].shape
    classes = torch.arange(batch) % 3
    classifier = small_model(MegaBertForSequenceClassification, num_labels=3)
    output = classifier(**inputs, labels=classes)
    assert output.logits.shape == (batch, 3)
    expected = torch.nn.functional.cross_entropy(output.logits, classes)
    torch.testing.assert_close(output.loss, expected)
    assert small_model(MegaBertForSequenceClassification, num_labels=1)(
        **inputs, labels=torch.rand(batch)
    ).loss.isfinite()
    several = classifier(**inputs, labels=torch.eye(3, dtype=torch.float64)[classes])
    assert several.loss.isfinite()
    tokens = small_model(MegaBertForTokenClassification, num_labels=4)
    labels = torch.where(inputs["attention_mask"].bool(), 1, -100)
    output = tokens(**inputs, labels=labels)
    assert output.logits.shape == (batch, length, 4)
    assert output.loss.isfinite()
    answers = small_model(MegaBertForQuestionAnswering)
    output = answers(
        **inputs, start_positions=torch.zeros(batch, dtype=torch.long), end_positions=torch.full((batch,), 99)
    )
    assert output.start_logits.shape == (batch, length)
    assert not small_model(MegaBertModel).eval()(**inputs).pooler_output.isnan().any()


def test_packed_classification_equals_padded():
    model = small_model(MegaBertForSequenceClassification, num_labels=3).eval()
    parts = documents()
    with torch.no_grad():
        torch.testing.assert_close(model(**packed(parts)).logits, model(**padded(parts)).logits, rtol=0, atol=1e-12)


def test_hidden_states_and_tuples_on_request():
    model = small_model().eval()
    inputs = padded(documents())
    with torch.no_grad():
        output = model(**inputs, output_hidden_states=True)
        plain = model(**inputs, return_dict=False)
    assert len(output.hidden_states) == SMALL["num_hidden_layers"] + 1
    torch.testing.assert_close(plain[0], output.logits)
    # A setting of transformers 4, for torch.jit.trace.
    model.config.torchscript = True
    assert isinstance(model(**inputs), tuple)
    model.config.torchscript = False
    deeper = small_model(padding="padded").eval()(**inputs, output_hidden_states=True)
    for a, b in zip(output.hidden_states, deeper.hidden_states, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-12)


def test_activation_checkpointing_changes_no_gradient():
    inputs = padded(documents())
    plain, saving = small_model(), small_model()
    saving.bert.encoder.checkpoint_every = 1
    for model in (plain, saving):
        model(**inputs, labels=inputs["input_ids"]).loss.backward()
    for a, b in zip(plain.parameters(), saving.parameters(), strict=True):
        assert torch.equal(a.grad, b.grad)


@pytest.mark.parametrize("low_precision", [True, False])
def test_residual_stream_dtype_under_autocast(low_precision):
    """Low-precision LayerNorm keeps the residual stream in bf16; otherwise it is fp32."""
    dtype = "bfloat16" if low_precision else "float32"
    model = MegaBertModel(MegaBertConfig(**SMALL, layer_norm_dtype=dtype)).eval()
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        states = model(**packed(documents()), output_hidden_states=True).hidden_states
    assert {state.dtype for state in states} == {torch.bfloat16 if low_precision else torch.float32}


def test_low_precision_layer_norm_costs_precision():
    """Both errors are within bf16's rounding; the error with an fp32 residual stream is smaller."""
    exact = small_model()
    inputs = packed(documents())
    with torch.no_grad():
        expected = exact(**inputs).logits
        errors = {}
        for dtype in ("bfloat16", "float32"):
            model = small_model(layer_norm_dtype=dtype).float()
            with torch.autocast("cpu", torch.bfloat16):
                errors[dtype] = float((model(**inputs).logits - expected).norm() / expected.norm())
    assert 0 < errors["float32"] < errors["bfloat16"] < 0.05


def test_dropout_only_while_training():
    model = small_model(hidden_dropout_prob=0.5, attention_probs_dropout_prob=0.5)
    inputs = padded(documents())
    model.eval()
    with torch.no_grad():
        assert torch.equal(model(**inputs).logits, model(**inputs).logits)
        model.train()
        assert not torch.equal(model(**inputs).logits, model(**inputs).logits)


def test_wrong_settings_and_shapes_are_refused():
    with pytest.raises(ValueError, match="position is 'rotary', expected one of alibi, learned, rope"):
        MegaBertConfig(position="rotary")
    with pytest.raises(ValueError, match="hidden_size 768 is not a multiple of num_attention_heads 7"):
        MegaBertConfig(num_attention_heads=7)
    with pytest.raises(ValueError, match=r"input_ids has shape \(5,\), expected \(batch, length\)"):
        small_model()(torch.arange(5))


@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        ({"rope_theta": 160_000.0}, "rope_theta is 160000.0, which has no effect with position alibi"),
        ({"position": "rope", "hidden_size": 21, "num_attention_heads": 3}, "the head size is 7, an odd number"),
        ({"position": "rope", "rope_theta": 0.5}, "rope_theta is 0.5, expected a number above 1"),
        ({"global_attention_every": 3}, "global_attention_every is 3 and local_attention_window None: .* Set both"),
        ({"local_attention_window": 128}, "a window needs local layers"),
        ({"global_attention_every": 3, "local_attention_window": 1}, "window is 1, expected a number from 2"),
        ({"position": "rope", "local_rope_theta": 10_000.0}, "makes every layer global"),
        ({"norm_position": "middle"}, "norm_position is 'middle', expected one of post, pre"),
        ({"bias": "no"}, "bias is 'no', expected true or false"),
    ],
)
def test_settings_that_make_no_sense_together_are_refused(settings, reason):
    with pytest.raises(ValueError, match=reason):
        MegaBertConfig(**settings)
