"""onnxruntime gives the model's logits for any batch size, length and mask."""

import numpy as np
import pytest
import torch
from transformers import AutoModelForMaskedLM, AutoTokenizer

import megabert
from megabert.convert import to_onnx
from megabert.model.modeling_megabert import (
    MegaBertForQuestionAnswering,
    MegaBertForSequenceClassification,
    MegaBertForTokenClassification,
    MegaBertModel,
)
from tests.convert.helpers.checkpoints import write_checkpoint
from tests.convert.helpers.small_model import BERT, small_model


def test_onnx_gives_the_same_answers(run_launcher, corpus, tmp_path):
    """transformers and onnxruntime agree on texts of several lengths, one by one and in a batch."""
    import onnxruntime

    run, out = tmp_path / "run", tmp_path / "hf"
    write_checkpoint(run, small_model(), corpus.tokenizer)
    done = run_launcher("convert_to_hf.py", run, out, "--onnx")
    assert done.code == 0, done.output
    assert "onnx/model.onnx: its logits differ by at most" in done.output
    megabert.register_auto_classes()  # loads the folder without its code
    tokenizer, model = AutoTokenizer.from_pretrained(out), AutoModelForMaskedLM.from_pretrained(out).eval()
    session = onnxruntime.InferenceSession(out / to_onnx.ONNX_MODEL)
    shapes = {node.name: node.shape for node in (*session.get_inputs(), *session.get_outputs())}
    rows = ["batch", "sequence"]
    assert shapes == {"input_ids": rows, "attention_mask": rows, "logits": [*rows, 832]}
    questions = [
        "the [MASK] of the module",
        "Returns [MASK].",
        "a list of [MASK], which are not " + "very " * 9 + "long",
    ]
    for texts in (questions, *([question] for question in questions)):
        inputs = tokenizer(texts, return_tensors="pt", padding=True)
        feed = {name: inputs[name].numpy() for name in ("input_ids", "attention_mask")}
        (got,) = session.run(["logits"], feed)
        with torch.no_grad():
            expected = model(**inputs).logits.numpy()
        real = feed["attention_mask"].astype(bool)
        np.testing.assert_allclose(got[real], expected[real], rtol=0, atol=1e-4)
        asked = feed["input_ids"] == tokenizer.mask_token_id
        assert (got[asked].argmax(-1) == expected[asked].argmax(-1)).all()


@pytest.mark.parametrize("changes", [BERT, {}], ids=["bert", "mosaicbert"])
def test_every_mask_gives_the_same_logits(tmp_path, changes):
    """A token is real where the mask is not 0, anywhere in the row. Large weights make a wrong distance show."""
    import onnxruntime

    model = small_model(**changes).eval()
    with torch.no_grad():
        for layer in model.bert.encoder.layers:
            layer.attention.qkv.weight.mul_(5)
    to_onnx.write_onnx(model, tmp_path)
    session = onnxruntime.InferenceSession(tmp_path / to_onnx.ONNX_MODEL)
    masks = {
        "whole": torch.ones(3, 40, dtype=torch.int64),
        "one token": torch.ones(1, 1, dtype=torch.int64),
        "padded": (torch.arange(40) < torch.tensor([[40], [7], [1]])).long(),
        "padded on the left": (torch.arange(40) >= torch.tensor([[0], [7], [39]])).long(),
        "with holes": (torch.rand(3, 40) < 0.6).long(),
        "not of ones": (torch.rand(3, 40) < 0.6).long() * torch.randint(-3, 4, (3, 40)),
        "an empty row": torch.tensor([[1, 1, 1], [0, 0, 0]]),
    }
    for name, mask in masks.items():
        ids = torch.randint(5, 800, mask.shape)
        (got,) = session.run(["logits"], {"input_ids": ids.numpy(), "attention_mask": mask.numpy()})
        with torch.no_grad():
            expected = model(ids, mask).logits
            ones = model(ids, (mask != 0).long()).logits
        assert torch.equal(expected, ones), name
        real = mask != 0
        torch.testing.assert_close(torch.from_numpy(got)[real], expected[real], rtol=0, atol=1e-4, msg=name)


@pytest.mark.parametrize(
    ("cls", "changes"),
    [
        (MegaBertModel, {}),
        (MegaBertForSequenceClassification, BERT),
        (MegaBertForSequenceClassification, {"classifier_pooling": "mean"}),
        (MegaBertForTokenClassification, {"padding": "padded"}),
        (MegaBertForQuestionAnswering, {}),
    ],
)
def test_the_graph_of_every_head_gives_the_same_outputs(cls, changes):
    model = small_model(cls=cls, **changes).eval()
    sizes = {0: torch.export.Dim.DYNAMIC, 1: torch.export.Dim.DYNAMIC}
    example = torch.ones(2, 7, dtype=torch.int64), torch.ones(2, 7, dtype=torch.int64)
    shapes = {"input_ids": sizes, "attention_mask": sizes}
    graph = torch.export.export(model, example, dynamic_shapes=shapes).module()
    for shape in ((1, 1), (3, 40)):
        ids, mask = torch.randint(5, 800, shape), (torch.rand(shape) < 0.6).long()
        mask[:, 0] = 1
        with torch.no_grad():
            got, expected = graph(ids, mask), model(ids, mask)
        for name, value in expected.items():
            real = mask != 0 if value.shape[:2] == shape else slice(None)  # outputs at padding are meaningless
            torch.testing.assert_close(got[name][real], value[real], rtol=0, atol=1e-5, msg=name)


def test_missing_onnx_packages_are_named(monkeypatch):
    monkeypatch.setattr(to_onnx, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"--onnx needs onnx, onnxscript, onnxruntime: pip install 'megabert\[onnx\]'"):
        to_onnx.check_installed()
