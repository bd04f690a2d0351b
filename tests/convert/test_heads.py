"""Heads of transformers' classes for tasks: imported with equal logits, and exported as those classes bit for bit."""

import json
import sys
from itertools import product
from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from megabert.convert.folder_to_hf import build_head, export_folder, select_weights
from megabert.convert.from_hf import ImportOptions, import_model, read_model
from megabert.convert.hf.heads import TASKS, head_of
from megabert.convert.hf.native import POOLED
from megabert.convert.to_hf import ExportOptions
from megabert.model.modeling_megabert import MegaBertForSequenceClassification
from tests.convert.helpers.folders import edit_json
from tests.convert.helpers.small_model import small_model
from tests.helpers.cases import cases
from tests.helpers.runs import Corpus, run_command
from tests.model.helpers.architectures import exact_rope  # noqa: F401
from tests.model.helpers.small import documents, packed, padded

SIZES = {
    "vocab_size": 832, "hidden_size": 24, "num_hidden_layers": 4, "num_attention_heads": 2, "intermediate_size": 40,
    "pad_token_id": 0, "max_position_embeddings": 64,
}  # fmt: skip
# A window of 4 tokens on each side, and documents that are shorter and longer.
IDS = {"local_attention": 8, "bos_token_id": 2, "eos_token_id": 3, "cls_token_id": 2, "sep_token_id": 3}
# What the classes of each kind need. XLM-RoBERTa and CamemBERT compute what RoBERTa does, and become that.
ROBERTA = {"pad_token_id": 0, "type_vocab_size": 1, "layer_norm_eps": 1e-5, "classifier_dropout": 0.2}
KINDS = {
    "Bert": {},
    "Roberta": ROBERTA,
    "XLMRoberta": ROBERTA,
    "Camembert": ROBERTA,
    "DistilBert": {"hidden_dim": SIZES["intermediate_size"], "seq_classif_dropout": 0.3},
    "Electra": {"embedding_size": SIZES["hidden_size"], "classifier_dropout": 0.2, "summary_last_dropout": 0.3},
    "ModernBert": IDS,
    "Gte": {},
}
NATIVE = {"XLMRoberta": "Roberta", "Camembert": "Roberta"}
LENGTHS = (5, 30, 17)
CASES = [
    ("ModernBert", "SequenceClassification", "cls"),
    ("ModernBert", "SequenceClassification", "mean"),
    ("ModernBert", "TokenClassification", "cls"),
    ("ModernBert", "QuestionAnswering", "cls"),
    ("ModernBert", "MultipleChoice", "cls"),
    ("Gte", "SequenceClassification", "cls"),
    ("Gte", "TokenClassification", "cls"),
    ("Bert", "SequenceClassification", "cls"),
    ("Bert", "TokenClassification", "cls"),
    ("Bert", "QuestionAnswering", "cls"),
    ("Bert", "MultipleChoice", "cls"),
    *((kind, head, "cls") for kind, head in product(("Roberta", "DistilBert", "Electra"), TASKS)),
    ("XLMRoberta", "SequenceClassification", "cls"),
    ("Camembert", "TokenClassification", "cls"),
]
NEW = [
    ("Roberta", "SequenceClassification"), ("XLMRoberta", "SequenceClassification"), ("DistilBert", "MultipleChoice"),
    ("Electra", "SequenceClassification"), ("Electra", "MultipleChoice"),
]  # fmt: skip
# A process of its own takes seconds, so that only some heads of RoBERTa and its like are checked in one.
FOREIGN = [case for case in CASES if case[0] in ("Bert", "ModernBert", "Gte") or case[:2] in NEW]
SOME = cases([*(CASES[number] for number in (1, 2, 5, 8)), *((*case, "cls") for case in NEW[::2])], CASES)


def make_folder(folder: Path, kind: str, head: str, pooling: str = "cls") -> transformers.PreTrainedModel:
    """Write a model of transformers with random weights and labels of its own. Returns it."""
    labels = {} if head in ("QuestionAnswering", "MultipleChoice") else {"id2label": {0: "a", 1: "b", 2: "c"}}
    sizes = {name: size for name, size in SIZES.items() if kind != "DistilBert" or name != "intermediate_size"}
    more = KINDS[kind] | ({"classifier_pooling": pooling, "classifier_dropout": 0.2} if kind == "ModernBert" else {})
    config = getattr(transformers, f"{kind}Config")(**sizes | more | labels)
    model = getattr(transformers, f"{kind}For{head}")(config).eval()
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(generator=generator).mul_(0.3)
    model.save_pretrained(folder)
    return model


def scores(model: torch.nn.Module, head: str, **inputs: torch.Tensor) -> torch.Tensor:
    if head == "MultipleChoice":
        inputs = {name: tensor[None] for name, tensor in inputs.items()}
    with torch.no_grad():
        output = model(**inputs)
    if head == "QuestionAnswering":
        return torch.stack([output.start_logits, output.end_logits], dim=-1)
    return output.logits


@pytest.mark.usefixtures("exact_rope")
@pytest.mark.parametrize(("kind", "head", "pooling"), SOME)
def test_logits_are_those_of_transformers(kind, head, pooling, tmp_path):
    theirs = make_folder(tmp_path, kind, head, pooling)
    model = read_model(tmp_path)
    assert model.unused == []
    assert head_of(model.config) == head
    assert model.config.id2label == theirs.config.id2label
    parts = documents(LENGTHS)
    inputs = padded(parts)
    for dtype, tolerance in ((torch.float64, 1e-10), (torch.float32, 1e-5)):
        theirs.to(dtype)
        expected = scores(theirs, head, **inputs)
        real = inputs["attention_mask"].bool() if expected.dim() == 3 else slice(None)
        for padding in ("unpadded", "padded"):
            model.config.padding = padding
            ours = build_head({name: x.to(dtype) for name, x in select_weights(model).items()}, model.config)
            got = scores(ours, head, **inputs)
            torch.testing.assert_close(got[real], expected[real], rtol=tolerance, atol=tolerance)
        if head == "SequenceClassification":
            got = scores(ours, head, **packed(parts))
            torch.testing.assert_close(got, expected, rtol=tolerance, atol=tolerance)


def import_with_tokenizer(source: Path, corpus: Corpus, out: Path) -> None:
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (source / name).write_bytes((corpus.tokenizer / name).read_bytes())
    import_model(source, out)


@pytest.mark.usefixtures("skipped_checks")
@pytest.mark.parametrize(("kind", "head", "pooling"), SOME)
def test_a_head_comes_back_as_transformers_class_bit_for_bit(kind, head, pooling, corpus, tmp_path):
    theirs = make_folder(tmp_path / "in", kind, head, pooling)
    import_with_tokenizer(tmp_path / "in", corpus, tmp_path / "ours")
    out = tmp_path / "hf"
    done = export_folder(tmp_path / "ours", out, ExportOptions())
    native = NATIVE.get(kind, kind)
    assert (done.name, done.initialized, done.left_out) == (f"{native}For{head}", [], [])
    back, info = getattr(transformers, f"AutoModelFor{head}").from_pretrained(out, output_loading_info=True)
    assert type(back).__name__ == f"{native}For{head}"
    assert not any(info[name] for name in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    state = theirs.state_dict()
    assert back.state_dict().keys() == state.keys()
    assert all(torch.equal(tensor, state[name]) for name, tensor in back.state_dict().items())
    # Files of GTE have other names than the class, which the class itself does not write.
    if kind != "Gte":
        first, second = (load_file(folder / "model.safetensors") for folder in (tmp_path / "in", out))
        assert first.keys() == second.keys()
    dropout = {("Electra", "MultipleChoice"): "summary_last_dropout", ("DistilBert", head): "seq_classif_dropout"}
    used = "dropout" if kind == "DistilBert" and head not in POOLED else dropout.get((kind, head), "classifier_dropout")
    for name in ("id2label", "classifier_pooling", "problem_type", used):
        assert getattr(back.config, name, None) == getattr(theirs.config, name, None), name
    assert export_folder(tmp_path / "ours", out, ExportOptions()).measured["reused"]


@pytest.mark.usefixtures("skipped_checks")
@pytest.mark.parametrize(
    ("kind", "head"), [("Gte", "MaskedLM"), ("Gte", "SequenceClassification"), ("Bert", "TokenClassification")]
)
def test_what_transformers_saves_of_an_export_is_read(kind, head, corpus, tmp_path):
    """It repeats a GTE's names in the file that it read, with "new." before those of the class."""
    make_folder(tmp_path / "in", kind, head)
    import_with_tokenizer(tmp_path / "in", corpus, tmp_path / "ours")
    export_folder(tmp_path / "ours", tmp_path / "hf", ExportOptions())
    getattr(transformers, f"AutoModelFor{head}").from_pretrained(tmp_path / "hf").save_pretrained(tmp_path / "saved")
    if kind == "Gte":
        assert all(name.startswith("new.") for name in load_file(tmp_path / "saved/model.safetensors"))
    model, wanted = read_model(tmp_path / "saved"), read_model(tmp_path / "ours")
    assert select_weights(model).keys() == select_weights(wanted).keys()
    assert all(torch.equal(tensor, wanted.weights[name]) for name, tensor in model.weights.items())


def test_a_classifier_of_ours_with_a_transform_but_no_decoder_is_read(tmp_path):
    saved = small_model(cls=MegaBertForSequenceClassification, norm_position="pre", position="rope")
    saved.save_pretrained(tmp_path)
    model = read_model(tmp_path)
    assert model.initialized == ["decoder.bias"]
    assert build_head(select_weights(model), model.config).state_dict().keys() == saved.state_dict().keys()


@pytest.mark.usefixtures("skipped_checks")
@pytest.mark.parametrize(("written", "length"), [(20, 20), (10**30, 64), (65, 64)])
def test_a_tokenizer_cuts_texts_where_the_source_says(written, length, corpus, tmp_path):
    """The model, which may read more, says so in its config as before."""
    make_folder(tmp_path / "in", "ModernBert", "TokenClassification")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (tmp_path / "in" / name).write_bytes((corpus.tokenizer / name).read_bytes())
    edit_json(tmp_path / "in/tokenizer_config.json", model_max_length=written)
    import_model(tmp_path / "in", tmp_path / "ours")
    export_folder(tmp_path / "ours", tmp_path / "hf", ExportOptions())
    for folder in (tmp_path / "ours", tmp_path / "hf"):
        assert json.loads((folder / "tokenizer_config.json").read_text())["model_max_length"] == length
        assert json.loads((folder / "config.json").read_text())["max_position_embeddings"] == 64
    import_model(tmp_path / "in", tmp_path / "longer", ImportOptions(max_length=96))
    assert json.loads((tmp_path / "longer/tokenizer_config.json").read_text())["model_max_length"] == 96


@pytest.mark.parametrize(("kind", "head", "pooling"), cases([("ModernBert", "QuestionAnswering", "cls")], FOREIGN))
def test_the_check_in_a_foreign_process_passes_and_the_command_exports_a_folder(
    kind, head, pooling, corpus, tmp_path, run_launcher
):
    make_folder(tmp_path / "in", kind, head, pooling)
    import_with_tokenizer(tmp_path / "in", corpus, tmp_path / "ours")
    done = run_launcher("convert_to_hf.py", tmp_path / "ours", tmp_path / "hf")
    assert done.code == 0, done.output
    assert f"{NATIVE.get(kind, kind)}For{head}; never trained: none" in done.output
    assert json.loads((tmp_path / "hf/export.json").read_text())["measured"]["max_difference"] < 1e-4
    if kind == "Bert" and head == "MultipleChoice":
        verified = run_command([sys.executable, "launch/convert_to_hf.py", "--verify-only", str(tmp_path / "hf")])
        assert verified.code == 0, verified.output


@pytest.mark.usefixtures("skipped_checks")
def test_what_transformers_has_no_class_for_stays_a_megabert_folder(corpus, tmp_path):
    model = make_folder(tmp_path / "in", "Gte", "SequenceClassification")
    import_with_tokenizer(tmp_path / "in", corpus, tmp_path / "ours")
    (tmp_path / "ours/import.json").unlink()
    edit_json(tmp_path / "ours/config.json", classifier_pooling="mean")
    export_folder(tmp_path / "ours", tmp_path / "hf", ExportOptions())
    loaded = transformers.AutoModelForSequenceClassification.from_pretrained(tmp_path / "hf", trust_remote_code=True)
    assert torch.equal(*(each.get_parameter("classifier.weight") for each in (loaded, model)))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"architectures": None}, r"has a classifier, but config.json does not name its class. Set architectures"),
        ({"architectures": ["ModernBertForCausalLM"]}, "is a ModernBertForCausalLM, expected ModernBertModel, .* or"),
        ({"architectures": "ModernBertForMaskedLM"}, "architectures is 'ModernBertForMaskedLM', expected a list of"),
        ({"architectures": ["ModernBertForMultipleChoice"], "classifier_pooling": "mean"}, "supports only 'cls'"),
        ({"id2label": {"0": "a"}, "num_labels": 1}, r"classifier.weight has shape \(3, 24\), .* implies \(1, 24\)"),
    ],
)
def test_a_head_that_is_not_what_its_config_says_is_refused(change, message, tmp_path):
    make_folder(tmp_path, "ModernBert", "SequenceClassification")
    edit_json(tmp_path / "config.json", **change)
    with pytest.raises(ValueError, match=f"{tmp_path}.*{message}"):
        read_model(tmp_path)


def test_a_head_that_the_weights_lack_and_folders_that_cannot_be_exported_are_named(tmp_path, run_launcher):
    make_folder(tmp_path / "in", "Bert", "SequenceClassification")
    path = tmp_path / "in/model.safetensors"
    out = tmp_path / "out"
    assert (
        "model_type is 'bert', expected a MegaBERT folder, an export or a run"
        in run_launcher("convert_to_hf.py", tmp_path / "in", out).output
    )
    import_model(tmp_path / "in", tmp_path / "ours")
    for flags, message in (
        ([], "has no tokenizer.json, with which an export is checked"),
        (["--for", "onnx"], "has no tokenizer.json, with which an export is checked"),
        (["--average", "2"], "--average needs a run with several checkpoints"),
    ):
        assert message in run_launcher("convert_to_hf.py", tmp_path / "ours", out, *flags).output
    save_file({name: x for name, x in load_file(path).items() if "classifier" not in name}, path)
    with pytest.raises(ValueError, match="in: is a BertForSequenceClassification .* but its weights have no class"):
        read_model(tmp_path / "in")
    edit_json(tmp_path / "in/config.json", architectures=None)
    assert head_of(read_model(tmp_path / "in").config) == "MaskedLM"
