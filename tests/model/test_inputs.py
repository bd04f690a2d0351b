"""Arguments of every head: what their shapes must be, embeddings instead of ids, and the names of labels."""

import pytest
import torch
from transformers import BertConfig, BertForMultipleChoice
from transformers.utils.generic import find_labels

from megabert.convert.weight_names import add_classifiers_pooler, normalize_our_names, to_megabert
from megabert.kernels.cpu import CPU_OPS
from megabert.model.layers import set_ops
from megabert.model.modeling_megabert import (
    MegaBertForMaskedLM,
    MegaBertForMultipleChoice,
    MegaBertForQuestionAnswering,
    MegaBertForSequenceClassification,
    MegaBertForTokenClassification,
    MegaBertModel,
)
from megabert.model.ops import TORCH_OPS
from tests.model.helpers.small import SMALL, documents, packed, padded, small_model

HEADS = [
    MegaBertModel,
    MegaBertForMaskedLM,
    MegaBertForSequenceClassification,
    MegaBertForTokenClassification,
    MegaBertForQuestionAnswering,
]
BERT = {"position": "learned", "ffn": "gelu"}
IDS = torch.arange(5, 17).view(2, 6)
WRONG_SHAPES = [(1, 6), (2, 5), (6,), (2, 1, 6), (2, 1, 1, 6), (2, 1), ()]


@pytest.mark.parametrize("cls", HEADS)
@pytest.mark.parametrize("name", ["attention_mask", "token_type_ids", "position_ids"])
@pytest.mark.parametrize("shape", WRONG_SHAPES)
@pytest.mark.parametrize("embedded", [False, True])
def test_an_argument_of_another_shape_is_refused_by_every_head(cls, name, shape, embedded):
    if (name, shape) == ("position_ids", (1, 6)):
        pytest.skip("allowed: one row of positions for every row")
    model = small_model(cls)
    given = {"inputs_embeds": torch.zeros(2, 6, 24, dtype=torch.float64)} if embedded else {"input_ids": IDS}
    text = str(shape).replace("(", r"\(").replace(")", r"\)")
    with pytest.raises(ValueError, match=rf"{name} has shape {text}, expected \(2, 6\)"):
        model(**given, **{name: torch.ones(shape, dtype=torch.long)})


@pytest.mark.parametrize("cls", HEADS)
def test_a_mask_to_be_added_to_scores_is_refused(cls):
    """It would mean the opposite of what its author means."""
    mask = torch.tensor([[0.0] * 6, [0.0] * 4 + [-1e4] * 2])
    with pytest.raises(ValueError, match="attention_mask has negative numbers.*expected 1 at real tokens and 0"):
        small_model(cls)(IDS, attention_mask=mask)
    ones = small_model(cls).eval()
    same = [next(iter(ones(IDS, attention_mask=kind).values())) for kind in ((mask == 0).float(), mask == 0)]
    assert torch.equal(*same)


@pytest.mark.parametrize("cls", HEADS)
def test_a_config_that_asks_for_attentions_is_refused_as_the_argument_is(cls):
    model = small_model(cls)
    model.config._output_attentions = True
    for arguments in ({}, {"output_attentions": None}, {"output_attentions": True}):
        with pytest.raises(ValueError, match="output_attentions: there are none to return"):
            model(IDS, **arguments)
    model(IDS, output_attentions=False)


@pytest.mark.parametrize("changes", [{}, BERT])
@pytest.mark.parametrize("name", ["word_embeddings", "token_type_embeddings", "position_embeddings"])
def test_a_hook_of_an_embedding_sees_and_changes_its_output(changes, name):
    """transformers adds noise in one (NEFTune), and peft makes outputs require gradients in one."""
    if name == "position_embeddings" and not changes:
        pytest.skip("ALiBi has none")
    model = small_model(MegaBertModel, **changes).eval()
    plain = model(IDS).last_hidden_state
    embedding = getattr(model.embeddings, name)
    hook = embedding.register_forward_hook(lambda module, ids, output: output * 2)
    doubled = model(IDS).last_hidden_state
    hook.remove()
    with torch.no_grad():
        embedding.weight *= 2
    assert torch.equal(model(IDS).last_hidden_state, doubled)
    assert not torch.equal(plain, doubled)


def test_gradients_reach_adapters_of_a_frozen_model_that_recomputes_its_layers():
    model = small_model(MegaBertModel).train().requires_grad_(False)
    weight = model.get_parameter("encoder.layers.0.attention.qkv.weight").requires_grad_(True)
    model.enable_input_require_grads()
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": True})
    model(IDS).last_hidden_state.square().sum().backward()
    assert weight.grad is not None
    assert weight.grad.abs().sum() > 0


def test_one_row_of_positions_serves_every_row():
    model = small_model(MegaBertModel, **BERT)
    positions = torch.tensor([[0, 2, 1, 5, 3, 4]])
    rows = model(IDS, position_ids=positions.expand(2, 6)).last_hidden_state
    assert torch.equal(model(IDS, position_ids=positions).last_hidden_state, rows)
    assert not torch.equal(model(IDS).last_hidden_state, rows)


@pytest.mark.parametrize("shape", WRONG_SHAPES)
@pytest.mark.parametrize("cls", [MegaBertForMaskedLM, MegaBertForTokenClassification])
def test_a_label_is_needed_for_every_token(cls, shape):
    with pytest.raises(ValueError, match=r"labels has shape .*, expected \(2, 6\): a label per token"):
        small_model(cls)(IDS, labels=torch.ones(shape, dtype=torch.long))
    with pytest.raises(ValueError, match=r"labels has shape .*, expected \(29,\): a label per token"):
        small_model(MegaBertForMaskedLM)(**packed(documents()), labels=torch.ones(shape, dtype=torch.long))


@pytest.mark.parametrize(
    ("settings", "labels", "message"),
    [
        ({"num_labels": 3}, torch.ones(1, dtype=torch.long), r"\(1,\), expected \(2,\)"),
        ({"num_labels": 3}, torch.ones(2, 6, dtype=torch.long), r"\(2, 6\), expected \(2,\)"),
        ({"num_labels": 3}, torch.ones(2), r"\(2,\), expected \(2, 3\)"),
        ({"num_labels": 3, "problem_type": "multi_label_classification"}, torch.ones(2, 1), r"\(2, 1\), expected"),
        ({"num_labels": 1}, torch.ones(3), r"\(3,\), expected \(2,\)"),
        ({"num_labels": 1}, torch.ones(2, 2), r"\(2, 2\), expected \(2,\)"),
        ({"num_labels": 3, "problem_type": "regression"}, torch.ones(2), r"\(2,\), expected \(2, 3\)"),
    ],
)
def test_labels_of_documents_have_the_shape_of_their_problem(settings, labels, message):
    with pytest.raises(ValueError, match=f"labels has shape {message}"):
        small_model(MegaBertForSequenceClassification, **settings)(IDS, labels=labels)


def test_labels_may_be_a_column_as_in_transformers():
    labels = torch.tensor([2, 0])
    classifier = small_model(MegaBertForSequenceClassification, num_labels=3).eval()
    assert torch.equal(classifier(IDS, labels=labels[:, None]).loss, classifier(IDS, labels=labels).loss)
    regression, numbers = small_model(MegaBertForSequenceClassification, num_labels=1).eval(), torch.tensor([0.5, 2.0])
    flat = regression(IDS, labels=numbers)
    assert torch.equal(regression(IDS, labels=numbers[:, None]).loss, flat.loss)
    torch.testing.assert_close(flat.loss, (flat.logits[:, 0] - numbers).square().mean())


def test_fractions_are_no_labels():
    with pytest.raises(ValueError, match="labels are torch.float32, expected integers"):
        small_model()(IDS, labels=torch.full((2, 6), 7.6))
    model = small_model(MegaBertForSequenceClassification, problem_type="single_label_classification")
    with pytest.raises(ValueError, match="labels are torch.float32, expected integers"):
        model(IDS, labels=torch.tensor([0.6, 1.0]))


@pytest.mark.parametrize("name", ["start_positions", "end_positions"])
@pytest.mark.parametrize("shape", [(1,), (2, 6), (3,), ()])
def test_an_answer_is_one_slot_per_row(name, shape):
    right = {"start_positions": torch.tensor([1, 2]), "end_positions": torch.tensor([3, 4])}
    with pytest.raises(ValueError, match=rf"{name} has shape .*, expected \(2,\): one slot per row"):
        small_model(MegaBertForQuestionAnswering)(IDS, **right | {name: torch.ones(shape, dtype=torch.long)})


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"input_ids": IDS}, r"input_ids has shape \(2, 6\), expected .* or \(tokens,\) with cu_seqlens"),
        ({"cu_seqlens": torch.tensor([[0, 29]])}, r"cu_seqlens has shape \(1, 2\), expected \(documents \+ 1,\)"),
        ({"cu_seqlens": torch.tensor([0, 28])}, "cu_seqlens goes from 0 to 28, .* from 0 to 29, the number of tokens"),
        ({"cu_seqlens": torch.tensor([1, 29])}, "cu_seqlens goes from 1 to 29"),
        ({"cu_seqlens": torch.tensor([0, 20, 10, 29])}, "numbers that never decrease"),
        ({"max_seqlen": 11}, "max_seqlen is 11, but a document has 12 tokens"),
        ({"attention_mask": torch.ones(29)}, "attention_mask was passed with cu_seqlens"),
        ({"position_ids": torch.zeros(28)}, r"position_ids has shape \(28,\), expected \(29,\)"),
        ({"token_type_ids": torch.zeros(1, dtype=torch.long)}, r"token_type_ids has shape \(1,\), expected \(29,\)"),
        (
            {"position_ids": torch.zeros(29), "masked_positions": torch.zeros(3), "masked_labels": torch.zeros(2)},
            r"masked_labels has .*\(3,\)",
        ),
        ({"masked_positions": torch.zeros(3)}, "those of a PackedBatch, which has .*masked_labels too"),
    ],
)  # fmt: skip
def test_a_packed_call_that_contradicts_itself_is_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        small_model()(**packed(documents()) | changes)


def test_a_length_without_documents_is_refused():
    with pytest.raises(ValueError, match="max_seqlen was passed without cu_seqlens"):
        small_model()(IDS, max_seqlen=6)


def test_an_answer_with_one_end_is_checked_too():
    with pytest.raises(ValueError, match=r"start_positions has shape \(2, 5\), expected \(2,\)"):
        small_model(MegaBertForQuestionAnswering)(IDS, start_positions=torch.ones(2, 5, dtype=torch.long))


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({}, "input_ids is missing: pass input_ids or inputs_embeds"),
        ({"input_ids": IDS, "inputs_embeds": torch.zeros(2, 6, 24)}, "were both passed, expected one"),
        ({"inputs_embeds": torch.zeros(2, 6, 23)}, r"has shape \(2, 6, 23\), expected \(2, 6, 24\)"),
        ({"inputs_embeds": torch.zeros(2, 6)}, r"has shape \(2, 6\), expected \(batch, length, width\)"),
    ],
)
@pytest.mark.parametrize("cls", HEADS)
def test_ids_or_embeddings_are_passed_but_not_both(cls, given, message):
    with pytest.raises(ValueError, match=message):
        small_model(cls)(**given)


@pytest.mark.parametrize("cls", HEADS)
@pytest.mark.parametrize("changes", [{}, BERT], ids=["mosaicbert", "bert"])
@pytest.mark.parametrize("layout", [padded, packed])
def test_embeddings_of_ids_give_what_the_ids_give(cls, changes, layout):
    if layout is packed and cls in (MegaBertForTokenClassification, MegaBertForQuestionAnswering):
        # These have no packed call.
        layout = padded
    model, inputs = small_model(cls, **changes).eval(), layout(documents())
    expected = model(**inputs)
    embeds = model.get_input_embeddings()(inputs.pop("input_ids"))
    for name, value in model(**inputs, inputs_embeds=embeds).items():
        assert torch.equal(value, expected[name]), name


FUSED_EMBEDDINGS = TORCH_OPS._replace(embed_layer_norm=CPU_OPS.embed_layer_norm)


@pytest.mark.parametrize(
    ("ops", "stance"),
    [
        pytest.param(None, "default", id="plain"),
        pytest.param(FUSED_EMBEDDINGS, "force_eager", id="fused"),
        pytest.param(FUSED_EMBEDDINGS, "default", id="compiled", marks=pytest.mark.nightly),
    ],
)
def test_embeddings_get_the_gradient_of_their_rows(ops, stance):
    """Summed over the tokens with one id, it is the gradient of that row of the word embeddings."""
    model, ids = small_model(MegaBertModel).eval(), IDS % 7 + 5
    if ops is not None:
        set_ops(model, ops)
    weights = torch.linspace(-1, 1, 2 * 6 * 24, dtype=torch.float64).view(2, 6, 24)
    table = model.get_parameter("embeddings.word_embeddings.weight")
    embeds = table.detach()[ids].requires_grad_()
    with torch.compiler.set_stance(stance):
        (model(ids).last_hidden_state * weights).sum().backward()
        (gradient,) = torch.autograd.grad((model(inputs_embeds=embeds).last_hidden_state * weights).sum(), embeds)
    sums = torch.zeros_like(table).index_add(0, ids.flatten(), gradient.flatten(0, 1))
    torch.testing.assert_close(sums, table.grad, rtol=0, atol=1e-10)


def test_multiple_choice_equals_transformers():
    theirs = BertForMultipleChoice(BertConfig(**SMALL)).double().eval()
    ours = small_model(MegaBertForMultipleChoice, **BERT).eval()
    weights = to_megabert(theirs.state_dict(), "bert").weights
    ours.load_state_dict(
        {name: tensor for name, tensor in add_classifiers_pooler(weights).items() if "bert.pooler" not in name}
    )
    ids, mask = torch.randint(5, 60, (2, 3, 7)), torch.ones(2, 3, 7, dtype=torch.long)
    mask[0, 1, 4:] = 0
    given = {"attention_mask": mask, "token_type_ids": torch.randint(0, 2, ids.shape), "labels": torch.tensor([2, 0])}
    got, expected = ours(ids, **given), theirs(ids, **given)
    torch.testing.assert_close(got.logits, expected.logits, rtol=0, atol=1e-10)
    torch.testing.assert_close(got.loss, expected.loss, rtol=0, atol=1e-10)
    embeds = ours.get_input_embeddings()(ids)
    assert torch.equal(ours(inputs_embeds=embeds, **given).logits, got.logits)
    assert normalize_our_names(ours.state_dict()).keys() >= {"bert.pooler.dense.weight", "classifier.weight"}
    wrong = {
        "attention_mask": mask[0], "token_type_ids": mask[:, :2], "position_ids": mask[:, :, :6],
        "labels": torch.tensor([1]), "input_ids": ids[0], "inputs_embeds": embeds[0],
    }  # fmt: skip
    for name, values in wrong.items():
        first = {} if name in ("input_ids", "inputs_embeds") else {"input_ids": ids}
        with pytest.raises(ValueError, match=f"{name} has shape .*, expected"):
            ours(**first, **{name: values})


@pytest.mark.parametrize("cls", [*HEADS, MegaBertForMultipleChoice])
def test_trainers_find_the_labels(cls):
    """transformers' Trainer evaluates the loss only if the batch has all arguments that find_labels() returns."""
    expected = {MegaBertModel: [], MegaBertForQuestionAnswering: ["start_positions", "end_positions"]}
    assert find_labels(cls) == expected.get(cls, ["labels"])
