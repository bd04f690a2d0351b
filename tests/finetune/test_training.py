"""One fine-tuning: packing, learning, the schedule, loading and errors."""

import json
import shutil

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import BertForSequenceClassification

from megabert.finetune.base_model import load_model, prepare_base_model, save_model
from megabert.finetune.protocol import Settings
from megabert.finetune.tasks.task import GLUE, Examples, Task
from megabert.finetune.training import (
    Backend,
    EncodedExamples,
    build_model,
    encode,
    finetune,
    load_tokenizer,
    pack,
    predict,
    rescale_embeddings,
    split_into_bins,
)
from megabert.model.configuration_megabert import MegaBertConfig
from megabert.model.modeling_megabert import MegaBertForSequenceClassification, mean_of_documents
from tests.helpers.foreign.published_folders import make_tokenizer

CPU = Backend(torch.device("cpu"), "torch")
SETTINGS = Settings(lr=5e-3, epochs=4, batch_size=32, dropout=0.0, attention_dropout=0.0, precision="fp32")
TINY = {"vocab_size": 32, "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}


def toy(count: int, seed: int, regression: bool = False) -> EncodedExamples:
    """Label 1 where token 7 occurs, or its count: learnable in seconds by a model that works."""
    rng = np.random.default_rng(seed)
    ids, labels = [], []
    for _ in range(count):
        words = rng.integers(10, 30, rng.integers(3, 9))
        label = int(rng.integers(2))
        if label:
            words[int(rng.integers(len(words)))] = 7
        ids.append([2, *words.tolist(), 3])
        labels.append(float(label) if regression else label)
    return EncodedExamples(ids, None, torch.tensor(labels))


@pytest.mark.parametrize("pooling", ["cls", "mean"])
def test_fine_tuning_learns(pooling):
    torch.manual_seed(0)
    model = MegaBertForSequenceClassification(
        MegaBertConfig(**TINY, hidden_dropout_prob=0.0, classifier_pooling=pooling)
    )
    trained = finetune(model, toy(600, 0), SETTINGS, CPU, seed=19)
    assert trained.examples == 2400
    test = toy(200, 1)
    assert test.labels is not None
    assert (predict(model, test, SETTINGS, CPU) == test.labels.numpy()).mean() > 0.95


def test_a_regression_learns():
    torch.manual_seed(0)
    model = MegaBertForSequenceClassification(MegaBertConfig(**TINY, hidden_dropout_prob=0.0, num_labels=1))
    finetune(model, toy(600, 0, regression=True), SETTINGS, CPU, seed=19)
    test = toy(200, 1, regression=True)
    assert test.labels is not None
    assert np.corrcoef(predict(model, test, SETTINGS, CPU), test.labels.numpy())[0, 1] > 0.9


@pytest.mark.parametrize("max_tokens", [1, 40, 1 << 20])
def test_bins_of_any_size_give_the_same_step(max_tokens, monkeypatch):
    """However a step's examples are split into bins, the loss is their mean."""
    ends = []
    for tokens in (1 << 20, max_tokens):
        monkeypatch.setitem(__import__("megabert.finetune.training", fromlist=["x"]).BIN_TOKENS, "cpu", tokens)
        torch.manual_seed(0)
        model = MegaBertForSequenceClassification(MegaBertConfig(**TINY, hidden_dropout_prob=0.0, num_labels=2))
        finetune(model.double(), toy(80, 0), SETTINGS, CPU, seed=19)
        ends.append(torch.cat([p.detach().flatten() for p in model.parameters()]))
    torch.testing.assert_close(*ends, rtol=0, atol=1e-9)


def test_examples_are_split_into_bins_in_order():
    encoded = EncodedExamples([[1] * n for n in (3, 2, 4, 9, 1)], None, None)
    assert [part.tolist() for part in split_into_bins(encoded, np.arange(5), 5)] == [[0, 1], [2], [3], [4]]


def test_packing_a_pair():
    encoded = EncodedExamples([[2, 9, 3], [2, 3], [2, 8, 3, 8, 3]], [[0] * 3, [0] * 2, [0, 0, 0, 1, 1]], None)
    inputs = pack(encoded, np.array([2, 0]), CPU.device)
    assert inputs["input_ids"].tolist() == [2, 8, 3, 8, 3, 2, 9, 3]
    assert inputs["token_type_ids"].tolist() == [0, 0, 0, 1, 1, 0, 0, 0]
    assert inputs["cu_seqlens"].tolist() == [0, 5, 8]
    assert inputs["max_seqlen"] == 5


def test_a_text_is_encoded_as_in_transformers_and_cut(bert):
    tokenizer = load_tokenizer(bert, 8)
    pairs = encode(Examples(["the cat sat on the mat"], ["good cats"], [1]), tokenizer, True)
    words = ["[CLS]", "the", "cat", "sat", "[SEP]", "good", "cat", "[SEP]"]
    assert [tokenizer.id_to_token(i) for i in pairs.input_ids[0]][:5] == words[:5]
    assert len(pairs.input_ids[0]) == 8
    assert pairs.token_type_ids == [[0] * 5 + [1] * 3]
    assert encode(Examples(["good"], None, None), tokenizer, True).token_type_ids is None


@pytest.fixture
def recorded(monkeypatch) -> dict:
    """What fine-tuning gives to AdamW: the parameter groups, and the learning rate of each step."""
    found: dict = {"lr": []}

    class RecordingAdamW(torch.optim.AdamW):
        def __init__(self, groups, **options):
            super().__init__(groups, **options)
            found["groups"] = self.param_groups

        def step(self, closure=None):
            found["lr"].append(self.param_groups[0]["lr"])
            return super().step(closure)

    monkeypatch.setattr(torch.optim, "AdamW", RecordingAdamW)
    return found


def test_the_learning_rate_warms_up_and_ends_near_zero(recorded):
    settings = Settings(lr=2**-10, epochs=100, batch_size=8, warmup=0.06, precision="fp32")
    finetune(MegaBertForSequenceClassification(MegaBertConfig(**TINY)), toy(8, 0), settings, CPU, seed=19)
    rates = [lr * 2**10 for lr in recorded["lr"]]
    assert len(rates) == 100
    assert rates[5] == rates[6] == 1.0
    assert rates[0] == pytest.approx(1 / 6)
    assert rates[-1] == pytest.approx(1 / 94)
    assert rates[6:] == sorted(rates[6:], reverse=True)


@pytest.mark.parametrize("everything", [True, False])
def test_norms_and_biases_decay_only_if_asked(recorded, everything):
    settings = Settings(
        lr=2e-5, weight_decay=1e-6, decoupled_decay=True, epochs=1, batch_size=8, decay_norms_and_biases=everything
    )
    finetune(MegaBertForSequenceClassification(MegaBertConfig(**TINY)), toy(8, 0), settings, CPU, seed=19)
    decays = [group["weight_decay"] for group in recorded["groups"]]
    assert decays == pytest.approx([0.05] if everything else [0.05, 0.0])
    assert everything or all(parameter.dim() > 1 for parameter in recorded["groups"][0]["params"])


@pytest.mark.parametrize("position", ["alibi", "learned"])
def test_rescaling_embeddings_changes_no_output(position):
    config = MegaBertConfig(**TINY, position=position)
    model = MegaBertForSequenceClassification(config).double().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.5)
        inputs = pack(toy(20, 0), np.arange(20), CPU.device)
        before = model(**inputs).logits
        rescale_embeddings(model)
        torch.testing.assert_close(model(**inputs).logits, before, rtol=0, atol=1e-6)
    assert model.bert.embeddings.word_embeddings.weight.std().item() == pytest.approx(config.initializer_range)


def test_the_mean_of_documents():
    hidden = torch.tensor([[1.0], [3.0], [5.0]])
    assert mean_of_documents(hidden, torch.tensor([0, 2, 2, 3])).flatten().tolist() == [2.0, 0.0, 5.0]
    # One of three slots, of which the last is padding.
    rows = torch.tensor([0, 3])
    assert mean_of_documents(hidden, rows, num_keys=torch.tensor([2])).flatten().tolist() == [2.0]


def test_a_loss_that_is_not_finite_is_an_error():
    model = MegaBertForSequenceClassification(MegaBertConfig(**TINY))
    with pytest.raises(ValueError, match="the loss was not finite in epoch 1 of 1. Lower lr"):
        finetune(
            model, toy(200, 0), Settings(lr=10, weight_decay=100, epochs=1, batch_size=8, precision="fp32"), CPU, 0
        )


def test_a_classifier_of_transformers_starts_from_the_same_encoder(bert, tmp_path):
    """Pairs through our packed model and through BertForSequenceClassification, with the same head."""
    base = prepare_base_model(bert, tmp_path / "start")
    model = build_model(base.folder, GLUE["mnli"], SETTINGS, CPU, 0).eval()
    theirs = BertForSequenceClassification.from_pretrained(bert, num_labels=3).eval()
    theirs.classifier.load_state_dict(model.classifier.state_dict())
    encoded = encode(
        Examples(["the cat sat", "bad"], ["on the mat", "so good"], [0, 1]), load_tokenizer(bert, 64), True
    )
    types = encoded.token_type_ids or []
    with torch.no_grad():
        ours = model(**pack(encoded, np.arange(2), CPU.device)).logits
        for number in range(2):
            inputs = (torch.tensor([encoded.input_ids[number]]), None, torch.tensor([types[number]]))
            torch.testing.assert_close(theirs(*inputs).logits[0], ours[number], rtol=0, atol=1e-5)


def test_the_base_model_is_reused_and_made_again_for_other_weights(bert, tmp_path):
    first = prepare_base_model(bert, tmp_path / "start")
    stamp = (first.folder / "model.safetensors").stat().st_mtime_ns
    assert prepare_base_model(bert, tmp_path / "start") == first
    assert (first.folder / "model.safetensors").stat().st_mtime_ns == stamp
    other = tmp_path / "other"
    other.mkdir()
    for name in ("config.json", "vocab.txt"):
        (other / name).write_bytes((bert / name).read_bytes())
    weights = load_file(bert / "model.safetensors")
    save_file({name: tensor * 2 for name, tensor in weights.items()}, other / "model.safetensors")
    assert prepare_base_model(other, tmp_path / "start").sha256 != first.sha256


def test_a_checkpoint_in_the_base_models_folder_is_refused_and_kept(bert, tmp_path):
    shutil.copytree(bert, tmp_path / "start")
    with pytest.raises(ValueError, match="this command writes its base model there. Choose another --out"):
        prepare_base_model(tmp_path / "start", tmp_path / "start")
    assert (tmp_path / "start" / "vocab.txt").is_file()


def test_a_folder_without_a_model_or_a_tokenizer_is_refused(bert, tmp_path):
    with pytest.raises(
        ValueError, match=r"no checkpoint here; expected a run's output folder, .*, or the folder of a BERT, ModernBERT"
    ):
        prepare_base_model(tmp_path, tmp_path / "start")
    for name in ("config.json", "model.safetensors"):
        (tmp_path / name).write_bytes((bert / name).read_bytes())
    with pytest.raises(ValueError, match=r"has no tokenizer\.json and no vocab\.txt"):
        prepare_base_model(tmp_path, tmp_path / "start")


def test_a_kept_model_is_loaded_without_its_classifier_or_exactly(bert, tmp_path):
    base = prepare_base_model(bert, tmp_path / "start").folder
    model = build_model(base, GLUE["mnli"], SETTINGS, CPU, 0)
    save_model(model, base, tmp_path / "kept")
    again = build_model(tmp_path / "kept", GLUE["rte"], SETTINGS, CPU, 1)
    assert all(torch.equal(a, b) for a, b in zip(model.bert.parameters(), again.bert.parameters(), strict=True))
    assert again.classifier.out_features == 2
    same = load_model(tmp_path / "kept", GLUE["mnli"], SETTINGS, CPU)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), same.parameters(), strict=True))
    with pytest.raises(ValueError, match="its weights are not those of a model for rte"):
        load_model(tmp_path / "kept", GLUE["rte"], SETTINGS, CPU)
    weights = load_file(tmp_path / "kept/model.safetensors")
    del weights["bert.embeddings.norm.bias"]
    save_file(weights, tmp_path / "kept/model.safetensors")
    with pytest.raises(ValueError, match=r"lacks 1 of the encoder's parameters.*such as bert\.embeddings\.norm\.bias"):
        build_model(tmp_path / "kept", GLUE["rte"], SETTINGS, CPU, 1)


def test_the_base_models_hash_includes_the_vocabulary_and_a_damaged_folder_is_made_again(bert, tmp_path):
    first = prepare_base_model(bert, tmp_path / "start")
    other = shutil.copytree(bert, tmp_path / "other")
    words = (other / "vocab.txt").read_text()
    (other / "vocab.txt").write_text(words.replace("cat\nsat\n", "sat\ncat\n"))
    assert prepare_base_model(other, tmp_path / "second").sha256 != first.sha256
    for name in ("model.safetensors", "tokenizer.json", "origin.json"):
        (first.folder / name).write_bytes(b"[" * 100_000 if name == "origin.json" else b"{")
        assert prepare_base_model(bert, tmp_path / "start") == first
        assert (first.folder / name).stat().st_size > 1
    (first.folder / "tokenizer.json").unlink()
    assert prepare_base_model(bert, tmp_path / "start") == first


def test_a_base_model_with_another_format_version_is_made_again(bert, tmp_path):
    base = prepare_base_model(bert, tmp_path / "start")
    path = base.folder / "origin.json"
    record = json.loads(path.read_text())
    for version in ({}, {"format_version": 0}):
        path.write_text(
            json.dumps({name: value for name, value in record.items() if name != "format_version"} | version)
        )
        stamp = path.stat().st_mtime_ns
        assert prepare_base_model(bert, tmp_path / "start") == base
        assert path.stat().st_mtime_ns > stamp
        assert json.loads(path.read_text()) == record


def test_a_folder_with_other_files_is_not_overwritten(bert, tmp_path):
    (tmp_path / "start").mkdir()
    (tmp_path / "start/thesis.txt").write_text("three years")
    with pytest.raises(ValueError, match="start: this command would write its base model there"):
        prepare_base_model(bert, tmp_path / "start")
    assert (tmp_path / "start/thesis.txt").read_text() == "three years"


def test_a_tokenizer_without_cls_is_refused(bert, tmp_path):
    raw = json.loads((prepare_base_model(bert, tmp_path / "start").folder / "tokenizer.json").read_text())
    raw["added_tokens"] = [token for token in raw["added_tokens"] if token["content"] != "[CLS]"]
    del raw["model"]["vocab"]["[CLS]"]
    raw["post_processor"] = None
    (tmp_path / "tokenizer.json").write_text(json.dumps(raw))
    with pytest.raises(ValueError, match=r"its tokenizer has no \[CLS\]"):
        load_tokenizer(tmp_path, 8)


def test_random_weights_are_not_the_pretrained_ones(bert, tmp_path):
    base = prepare_base_model(bert, tmp_path / "start").folder
    task = Task(name="own", texts=("text",), metrics=("pearson",))
    pretrained, fresh = (build_model(base, task, SETTINGS, CPU, 1, kind) for kind in (True, False))
    name = "bert.embeddings.word_embeddings.weight"
    assert torch.equal(pretrained.state_dict()[name], load_file(base / "model.safetensors")[name])
    assert not torch.equal(fresh.state_dict()[name], pretrained.state_dict()[name])
    assert fresh.classifier.out_features == 1


@pytest.mark.parametrize("kind", ["Roberta", "XLMRoberta", "DistilBert"])
def test_pairs_are_put_together_as_in_pretraining(kind, corpus, tmp_path):
    """RoBERTa's tokenizers put two </s> between two texts, BERT's one [SEP]."""
    theirs = make_tokenizer(kind, corpus.texts[:20])
    theirs.save_pretrained(tmp_path)
    tokenizer = load_tokenizer(tmp_path, 64)
    assert tokenizer.encode("a b", "c").ids == theirs("a b", "c")["input_ids"]
    assert tokenizer.encode("a b").ids == theirs("a b")["input_ids"]
