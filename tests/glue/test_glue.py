import numpy as np
import pytest
import torch
from transformers import BertConfig

from megabert.glue import movie_sentiment
from megabert.glue.baselines import tfidf
from megabert.glue.finetune import (
    Encoded,
    FinetuneConfig,
    _check_loaded,
    build_classifier,
    finetune,
    load_tokenizer,
    pack,
    predict,
    rescale_embeddings,
)
from megabert.glue.report import markdown
from megabert.glue.tasks import Examples, Task
from megabert.model.configuration_megabert import MegaBertConfig
from megabert.model.modeling_megabert import MegaBertForSequenceClassification, mean_of_documents

TINY = {"vocab_size": 32, "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
TASK = Task(name="toy", num_labels=2, metric="accuracy")


def toy(count: int, seed: int) -> Encoded:
    """Label 1 where token 7 occurs: learnable in seconds by a model that works."""
    rng = np.random.default_rng(seed)
    ids, labels = [], []
    for _ in range(count):
        label = int(rng.integers(2))
        words = rng.integers(10, 30, rng.integers(3, 9)).tolist()
        if label:
            words[int(rng.integers(len(words)))] = 7
        ids.append([2, *words, 3])
        labels.append(label)
    return Encoded(ids, torch.tensor(labels))


@pytest.mark.parametrize("pooling", ["cls", "mean"])
def test_fine_tuning_learns(pooling):
    torch.manual_seed(0)
    config = MegaBertConfig(**TINY, hidden_dropout_prob=0.0, classifier_pooling=pooling)
    model = MegaBertForSequenceClassification(config)
    finetune(model, toy(600, 0), FinetuneConfig(epochs=4, lr=5e-3))
    test = toy(200, 1)
    assert (predict(model, test) == test.labels.numpy()).mean() > 0.95


@pytest.mark.parametrize("position", ["alibi", "learned"])
def test_rescaling_embeddings_changes_no_output(position):
    config = MegaBertConfig(**TINY, position=position)
    model = MegaBertForSequenceClassification(config).double().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.5)
        inputs, _ = pack(toy(20, 0), np.arange(20))
        before = model(**inputs).logits
        rescale_embeddings(model)
        torch.testing.assert_close(model(**inputs).logits, before, rtol=0, atol=1e-6)
    assert model.bert.embeddings.word_embeddings.weight.std().item() == pytest.approx(config.initializer_range)


def test_packing_examples():
    inputs, labels = pack(Encoded([[2, 9, 3], [2, 3], [2, 8, 8, 3]], torch.tensor([0, 1, 2])), np.array([2, 0]))
    assert inputs["input_ids"].tolist() == [2, 8, 8, 3, 2, 9, 3]
    assert inputs["cu_seqlens"].tolist() == [0, 4, 7]
    assert inputs["max_seqlen"] == 4
    assert labels.tolist() == [2, 0]


def test_the_mean_of_documents():
    hidden = torch.tensor([[1.0], [3.0], [5.0]])
    assert mean_of_documents(hidden, torch.tensor([0, 2, 2, 3])).flatten().tolist() == [2.0, 0.0, 5.0]


def test_movie_sentiment_is_the_pinned_file():
    train, test = movie_sentiment.read(movie_sentiment.fetch(movie_sentiment.Path("data/glue")))
    assert len(train.texts) + len(test.texts) == 10_072
    assert sum(train.labels) + sum(test.labels) == 4_996
    assert len(set(train.texts) & set(test.texts)) < 20  # the file itself repeats a few snippets
    assert tfidf(train, test).value > 0.75


def test_another_file_of_that_name_is_refused(tmp_path):
    (tmp_path / movie_sentiment.SDIST).write_bytes(b"something else")
    with pytest.raises(ValueError, match="expected 5d7c06e027fc8b99"):
        movie_sentiment.fetch(tmp_path)


def test_a_package_that_cannot_be_fetched_is_named(tmp_path, monkeypatch):
    monkeypatch.setattr(movie_sentiment, "PACKAGE", "vaderSentiment==0.0.0.nothing")
    with pytest.raises(ValueError, match="pip could not fetch it"):
        movie_sentiment.fetch(tmp_path)


def test_a_folder_that_is_no_export_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"config\.json; expected a folder written by launch/convert_to_hf\.py"):
        build_classifier(tmp_path, TASK, FinetuneConfig(), pretrained=True)
    with pytest.raises(ValueError, match=r"tokenizer\.json: no such file"):
        load_tokenizer(tmp_path, 32)


def test_transformers_own_bert_is_refused_with_the_way_out(tmp_path):
    BertConfig().save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="is a bert model. Make it one of ours with launch/convert_from_hf.py"):
        build_classifier(tmp_path, TASK, FinetuneConfig(), pretrained=True)


def test_an_export_without_its_encoder_is_refused(tmp_path):
    settings = MegaBertConfig()
    _check_loaded({"missing_keys": ["classifier.weight", "bert.pooler.dense.bias"]}, settings, tmp_path)
    with pytest.raises(ValueError, match=r"lacks 1 of the encoder's parameters, such as bert\.embeddings\.norm\.bias"):
        _check_loaded({"missing_keys": ["bert.embeddings.norm.bias"]}, settings, tmp_path)


def test_the_table_names_the_task_and_its_size():
    table = markdown(TASK, {"tfidf": {"scores": [0.5, 0.7], "seconds": 3.0}}, 100, 20)
    assert "toy: 100 training and 20 test examples" in table
    assert "| TF-IDF + logistic regression | 0.600 | 2 | 3 |" in table


def test_tfidf_learns_words():
    train = Examples(["good film", "bad film", "good story", "bad story"] * 5, [1, 0, 1, 0] * 5)
    assert tfidf(train, Examples(["good", "bad"], [1, 0])).value == 1.0
