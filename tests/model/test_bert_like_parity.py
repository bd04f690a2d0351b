"""RoBERTa, DistilBERT and ELECTRA equal transformers' own: logits, losses, states and every gradient."""

from itertools import product

import pytest
import torch
import transformers

from megabert.convert.hf.bert_like_configs import to_bert_like_config
from megabert.convert.weight_names import from_megabert, to_megabert
from megabert.model import modeling_megabert as modeling
from tests.helpers.cases import cases
from tests.model.helpers.architectures import ARCHITECTURES
from tests.model.helpers.small import SMALL, documents, packed, padded, small_model

CLASSES = {
    "roberta": transformers.RobertaForMaskedLM,
    "distilbert": transformers.DistilBertForMaskedLM,
    "electra": transformers.ElectraForMaskedLM,
}
TOLERANCES = {torch.float64: 1e-10, torch.float32: 1e-5}
PLACES = ("right", "left", "holes")


def model_of(kind, dtype=torch.float64, **changes):
    # The padding token of each is its own, as in published models.
    pad = {"pad_token_id": 1, "position_offset": 2} if kind == "roberta" else {"pad_token_id": 0}
    return small_model(**ARCHITECTURES[kind] | {"attention_probs_dropout_prob": 0.0} | pad | changes).to(dtype)


def their_model(kind, ours):
    """Build transformers' model with the weights of ours."""
    theirs = CLASSES[kind](to_bert_like_config(ours.config, kind, {})).to(ours.decoder.bias.dtype)
    theirs.load_state_dict(from_megabert(ours.state_dict(), kind))
    return theirs


def assert_close(got, expected, tolerance, what):
    torch.testing.assert_close(got, expected, rtol=tolerance, atol=tolerance, msg=lambda text: f"{what}: {text}")


def assert_same_gradients(ours, theirs, kind, tolerance):
    grads = {name: parameter.grad for name, parameter in theirs.named_parameters()}
    expected = to_megabert(grads, kind).weights
    got = {name: parameter.grad for name, parameter in ours.named_parameters()}
    assert got.keys() == expected.keys()
    for name, grad in got.items():
        assert_close(grad, expected[name], tolerance, name)


def batch_of(place, pad):
    """Rows whose padding is on the right or left, or between tokens."""
    generator = torch.Generator().manual_seed(5)
    ids = torch.randint(5, SMALL["vocab_size"], (4, 9), generator=generator)
    slot, length = torch.arange(9), torch.tensor([9, 1, 5, 8])[:, None]
    real = {"right": slot < length, "left": slot >= 9 - length, "holes": (slot * 4) % 9 < length}[place]
    return {"input_ids": ids.masked_fill(~real, pad), "attention_mask": real.long()}, real


@pytest.mark.parametrize(
    ("kind", "place", "attention", "padding", "dtype"),
    cases(
        per_push=[
            ("roberta", "left", "sdpa", "unpadded", torch.float64),
            ("roberta", "right", "eager", "padded", torch.float32),
            ("distilbert", "holes", "sdpa", "unpadded", torch.float64),
            ("electra", "right", "sdpa", "padded", torch.float64),
        ],
        nightly=product(CLASSES, PLACES, ["eager", "sdpa"], ["unpadded", "padded"], TOLERANCES),
    ),
)
def test_masked_language_model(kind, place, attention, padding, dtype):
    tolerance = TOLERANCES[dtype]
    ours = model_of(kind, dtype, padding=padding)
    ours.config._attn_implementation = attention
    theirs = their_model(kind, ours)
    inputs, real = batch_of(place, ours.config.pad_token_id)
    labels = torch.where(real, inputs["input_ids"], -100)
    got = ours(**inputs, labels=labels, output_hidden_states=True)
    expected = theirs(**inputs, labels=labels, output_hidden_states=True)
    assert_close(got.logits[real], expected.logits[real], tolerance, "logits")
    assert_close(got.loss, expected.loss, tolerance, "loss")
    for layer, (mine, state) in enumerate(zip(got.hidden_states, expected.hidden_states, strict=True)):
        assert_close(mine[real], state[real], tolerance, f"state {layer}")
    got.loss.backward()
    expected.loss.backward()
    assert_same_gradients(ours, theirs, kind, tolerance)


@pytest.mark.parametrize("kind", CLASSES)
def test_packed_documents_are_transformers_rows(kind):
    """The third has the padding token among its tokens, which RoBERTa does not count."""
    ours = model_of(kind)
    theirs = their_model(kind, ours).eval()
    parts = documents((5, 1, 9, 7))
    parts[2][torch.tensor([0, 4, 8])] = ours.config.pad_token_id
    with torch.no_grad():
        got = ours(**packed(parts)).logits.split([len(part) for part in parts])
        for part, mine in zip(parts, got, strict=True):
            assert_close(mine, theirs(part[None]).logits[0], 1e-10, f"{len(part)} tokens")
            assert_close(ours(part[None]).logits[0], mine, 1e-12, f"{len(part)} tokens in a row")


def test_embeddings_of_the_caller_and_positions_of_the_caller_count_from_the_first_token():
    ours = model_of("roberta").eval()
    theirs = their_model("roberta", ours).eval()
    ids = documents((9,))[0][None]
    words = ours.get_input_embeddings()(ids).detach()
    places = torch.arange(9).flip(0)[None]
    with torch.no_grad():
        assert_close(ours(inputs_embeds=words).logits, theirs(inputs_embeds=words).logits, 1e-10, "embeddings")
        got, expected = ours(ids, position_ids=places), theirs(ids, position_ids=places + ours.config.position_offset)
    assert_close(got.logits, expected.logits, 1e-10, "positions")


def test_a_text_longer_than_the_positions_is_refused_wherever_its_padding_is():
    ours = model_of("roberta", max_position_embeddings=5).eval()
    inputs, _ = batch_of("left", ours.config.pad_token_id)
    with pytest.raises(ValueError, match="a text has 9 tokens, but the model has learned the positions of 5"):
        ours(**inputs)
    # Its rows have 1 and 5 tokens.
    short = {name: tensor[1:3] for name, tensor in inputs.items()}
    theirs = their_model("roberta", ours).eval()
    real = short["attention_mask"].bool()
    with torch.no_grad():
        assert_close(ours(**short).logits[real], theirs(**short).logits[real], 1e-10, "logits")


@pytest.mark.parametrize("head", ["SequenceClassification", "TokenClassification", "QuestionAnswering"])
@pytest.mark.parametrize("kind", CLASSES)
def test_gradients_of_heads(kind, head):
    """With dropout off, since RoBERTa's and ELECTRA's classifiers also drop features before their first layer."""
    off = {"hidden_dropout_prob": 0.0, "classifier_dropout": 0.0}
    cls = getattr(modeling, f"MegaBertFor{head}")
    labels = {} if head == "QuestionAnswering" else {"num_labels": 3}
    ours = small_model(cls, **ARCHITECTURES[kind] | {"attention_probs_dropout_prob": 0.0} | off | labels)
    ours.config.architectures = [f"MegaBertFor{head}"]
    config = to_bert_like_config(ours.config, kind, {})
    # DistilBERT has a dropout of its own before the scores of answers.
    config.qa_dropout = 0.0
    theirs = getattr(transformers, (config.architectures or [])[0])(config).double()
    theirs.load_state_dict(from_megabert(ours.state_dict(), kind, head=head))
    inputs = padded(documents((20, 20, 20)))
    targets = {
        "SequenceClassification": {"labels": torch.tensor([0, 2, 1])},
        "TokenClassification": {"labels": inputs["input_ids"] % 3},
        "QuestionAnswering": {"start_positions": torch.tensor([0, 1, 0]), "end_positions": torch.tensor([0, 3, 8])},
    }
    for model in (ours, theirs):
        output = model(**inputs, **targets[head])
        output.loss.backward()
    got = from_megabert({name: x.grad for name, x in ours.named_parameters()}, kind, duplicates=False, head=head)
    expected = {name: parameter.grad for name, parameter in theirs.named_parameters()}
    assert got.keys() == expected.keys()
    for name, grad in expected.items():
        assert_close(got[name], grad, 1e-10, name)
