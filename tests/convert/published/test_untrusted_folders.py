"""Malicious and damaged folders are refused with one line, before much memory is allocated."""

import json
import random
import resource
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import BertConfig, BertForSequenceClassification

from megabert.convert.deepspeed_checkpoint import load_without_executing
from megabert.convert.from_hf import ImportOptions, import_model, read_model
from megabert.convert.hf.reader import read_weights
from megabert.convert.hf.writer import check_shard_size, write_config, write_weights
from megabert.convert.weight_names import from_megabert, num_layers, to_megabert
from megabert.model.modeling_megabert import MegaBertForMaskedLM
from tests.convert.helpers.folders import edit_json, write_published_mosaicbert
from tests.convert.helpers.small_model import BERT, SHAPE, small_model

WEIGHTS = "model.safetensors"


@pytest.fixture
def ours(tmp_path) -> Path:
    small_model().save_pretrained(tmp_path / "in")
    return tmp_path / "in"


def add(folder: Path, **tensors: torch.Tensor) -> None:
    named = {name.replace("__", "."): tensor for name, tensor in tensors.items()}
    save_file(load_file(folder / WEIGHTS) | named, folder / WEIGHTS, metadata={"format": "pt"})


@pytest.mark.parametrize("number", ["1000000000", "9" * 5000, "01", "3"])
def test_a_layer_of_any_number_costs_no_memory(number):
    state = from_megabert(small_model().state_dict(), "mosaicbert")
    state[f"bert.encoder.layer.{number}.mlp.wo.bias"] = torch.zeros(24)
    with pytest.raises(ValueError, match=f"has tensors of layer .*{number[:20]}|but none of layer 2") as error:
        to_megabert(state, "mosaicbert")
    assert len(str(error.value)) < 200
    assert num_layers({}, "layers") == 0


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"max_length": 10**12}, "the maximum length is 1,000,000,000,000, expected at most 10,000,000 at width 24"),
        ({"tokenizer": "tokenizer.json", "pad_vocab_to_multiple_of": 10**13}, "rounded up, is 10,000,000,000,000"),
        ({"seed": -1}, "the seed is -1"),
        ({"seed": 2**64}, "the seed is 18446744073709551616"),
    ],
)
def test_excessive_options_fail_before_anything_is_allocated(corpus, ours, tmp_path, change, message):
    shutil.copyfile(corpus.tokenizer / "tokenizer.json", ours / "tokenizer.json")
    if "tokenizer" in change:
        change |= {"tokenizer": str(ours / change["tokenizer"])}
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(ValueError, match=message):
        import_model(ours, tmp_path / "out", ImportOptions(**change))
    # KiB.
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 100 * 1024
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_labels": 10**9}, "num_labels is 1000000000, expected a number from 1 to 100,000"),
        ({"id2label": ["a", "b"]}, r"id2label is \['a', 'b'\], expected an object"),
        ({"id2label": []}, r"id2label is \[\], expected an object"),
        ({"id2label": {"0": 1}}, "id2label is {'0': 1}, expected an object from numbers to labels"),
        ({"label2id": {"a": "0"}}, "label2id is {'a': '0'}, expected an object from labels to numbers"),
        ({"problem_type": 7}, "problem_type is 7, expected one of regression"),
        ({"initializer_range": -1}, "initializer_range is -1, expected a number from 0"),
        ({"initializer_range": "x"}, "initializer_range is 'x', expected a number from 0"),
        ({"z_loss": None}, "z_loss is None, expected a number from 0"),
        ({"pad_token_id": "0"}, "pad_token_id is '0', expected a number"),
        ({"quantization_config": {"quant_method": "bitsandbytes"}}, "has a quantization_config"),
        ({"tie_word_embeddings": False}, "tie_word_embeddings is False; this model ties them"),
        ({"position": ["alibi"]}, r"position is \['alibi'\], expected one of"),
        ({"layer_norm_eps": 1}, "layer_norm_eps is 1, expected a number from 1e-30 to 1"),
    ],
)
def test_an_invalid_config_is_refused(ours, changes, message):
    edit_json(ours / "config.json", **changes)
    with pytest.raises(ValueError, match=message):
        read_model(ours)


def test_an_unknown_dtype_is_ignored(ours):
    edit_json(ours / "config.json", dtype="float99", torch_dtype="float99")
    assert read_model(ours).initialized == []


@pytest.mark.parametrize("name", ["config.json", "tokenizer_config.json", "vocab.txt", "model.safetensors.index.json"])
def test_no_file_may_be_a_link_out_of_the_folder(ours, tmp_path, name):
    if name.endswith("index.json"):
        index = {"weight_map": dict.fromkeys(load_file(ours / WEIGHTS), "part.safetensors")}
        (ours / WEIGHTS).rename(ours / "part.safetensors")
        (ours / name).write_text(json.dumps(index))
    elif name != "config.json":
        (ours / "vocab.txt").write_text("[PAD]\n[UNK]\n[CLS]\n[SEP]\n[MASK]\n")
        (ours / "tokenizer_config.json").write_text("{}")
    (ours / name).rename(tmp_path / "secret")
    (ours / name).symlink_to(tmp_path / "secret")
    with pytest.raises(ValueError, match=f"{name}: is a link to .*secret, outside its folder"):
        import_model(ours, tmp_path / "out")


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        (
            {"bert__pooler__dense__weight": (24, 23), "bert__pooler__dense__bias": (24,)},
            r"pooler.dense.weight has shape \(24, 23\), but its config.json implies \(24, 24\)",
        ),
        ({"bert__pooler__dense__weight": (24, 24)}, r"lacks bert.pooler.dense.bias, expected with shape \(24,\)"),
        (
            {"classifier__weight": (7, 24), "classifier__bias": (7,)},
            r"classifier.weight has shape \(7, 24\), but its config.json implies \(3, 24\)",
        ),
        ({"classifier__bias": (3,)}, "lacks classifier.weight"),
        (
            {"qa_outputs__weight": (2, 24), "qa_outputs__bias": (3,)},
            r"qa_outputs.bias has shape \(3,\), but its config.json implies \(2,\)",
        ),
        ({"classifier__extra": (1,)}, "classifier.extra|lacks classifier.weight"),
    ],
)  # fmt: skip
def test_heads_must_have_the_shapes_that_the_config_implies(ours, tensors, message):
    edit_json(ours / "config.json", id2label={"0": "a", "1": "b", "2": "c"}, label2id={"a": 0, "b": 1, "c": 2})
    add(ours, **{name: torch.zeros(shape) for name, shape in tensors.items()})
    with pytest.raises(ValueError, match=message):
        read_model(ours)


def test_berts_classifier_must_match_its_labels_too(tmp_path):
    BertForSequenceClassification(BertConfig(**SHAPE | {"num_labels": 3})).save_pretrained(tmp_path)
    assert read_model(tmp_path).config.num_labels == 3
    edit_json(tmp_path / "config.json", id2label={"0": "a", "1": "b"}, label2id={"a": 0, "b": 1})
    with pytest.raises(ValueError, match=r"classifier.weight has shape \(3, 24\), .* implies \(2, 24\)"):
        read_model(tmp_path)


def test_an_index_must_list_exactly_the_tensors_in_the_files(ours):
    weights = load_file(ours / WEIGHTS)
    (ours / WEIGHTS).unlink()
    first, second = sorted(weights)[:9], sorted(weights)[9:]
    for file, names in (("a.safetensors", first), ("b.safetensors", second)):
        save_file({name: weights[name] for name in names}, ours / file)
    index = dict.fromkeys(first, "a.safetensors") | dict.fromkeys(second, "b.safetensors")

    def write_index(weight_map: dict) -> None:
        (ours / f"{WEIGHTS}.index.json").write_text(json.dumps({"weight_map": weight_map}))

    write_index(index)
    assert read_weights(ours).keys() == weights.keys()
    write_index(index | {"bert.extra": "b.safetensors"})
    with pytest.raises(ValueError, match="b.safetensors: lacks 1 tensors that the index lists: bert.extra"):
        read_weights(ours)
    write_index({name: file for name, file in index.items() if name != second[0]})
    with pytest.raises(ValueError, match=f"b.safetensors: contains 1 tensors .* does not list: {second[0]}"):
        read_weights(ours)
    write_index(index | {first[0]: "b.safetensors"})
    with pytest.raises(ValueError, match=f"a.safetensors: contains 1 tensors that the index does not list: {first[0]}"):
        read_weights(ours)
    write_index({})
    with pytest.raises(ValueError, match="has no weight_map from names to files"):
        read_weights(ours)


@pytest.mark.parametrize("zipped", [True, False])
def test_a_damaged_pickle_raises_value_error(tmp_path, zipped):
    """Whatever the unpickler raises for a hundred kinds of damage becomes a ValueError that names the file."""
    path = tmp_path / "pytorch_model.bin"
    torch.save({"a.b": torch.randn(3, 4), "c": torch.zeros(2)}, path, _use_new_zipfile_serialization=zipped)
    whole, generator, refused = path.read_bytes(), random.Random(0), 0
    begin = whole.find(b"\x80\x02")
    for _ in range(100):
        data = bytearray(whole)
        for _ in range(3):
            data[begin + generator.randrange(150)] = generator.randrange(256)
        path.write_bytes(data)
        for reader in (lambda: read_weights(tmp_path), lambda: load_without_executing(path)):
            try:
                reader()
            except ValueError as error:
                refused += str(path) in str(error)
    assert refused > 100


def test_a_full_disk_is_reported_in_one_line_and_leaves_nothing(run_launcher, ours, tmp_path):
    """A limit on the size of files fails in the same place as a full disk."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (40_000, limits[1]))
    try:
        done = run_launcher("convert_from_hf.py", ours, tmp_path / "out")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert done.code == 1
    assert "model.safetensors: File too large. Raise the limit of file sizes (ulimit -f)" in done.output
    assert done.output.count("\n") == 1
    assert [path.name for path in tmp_path.iterdir()] == ["in"]


@pytest.mark.parametrize("size", ["0GB", "-5GB", "5", "GB", "lots", "", "0.0MB", "1e3GB", "nanGB", "5GB\n", "5 GB"])
def test_an_invalid_shard_size_is_refused(size):
    with pytest.raises(ValueError, match="max_shard_size is .*expected a number and KB, MB, GB or TB"):
        check_shard_size(size)


def test_valid_shard_sizes_are_accepted(tmp_path):
    model = small_model()
    weights = {name: parameter.detach() for name, parameter in model.named_parameters()}
    write_config(tmp_path, model.config)
    for size in ("0.5KB", "10KB"):
        check_shard_size(size)
        write_weights(tmp_path, weights, size)
    assert all(torch.equal(tensor, weights[name]) for name, tensor in read_weights(tmp_path).items())


def test_the_launcher_refuses_a_folder_in_one_line(run_launcher, tmp_path):
    write_published_mosaicbert(tmp_path / "in", **{"bert.encoder.layer.1000000000.mlp.wo.bias": torch.zeros(24)})
    done = run_launcher("convert_from_hf.py", tmp_path / "in", tmp_path / "out")
    assert done.code == 1
    assert "has tensors of layer 1000000000, but none of layer 2" in done.output
    assert done.output.count("\n") == 1


def test_a_folder_may_be_written_through_a_link_to_an_empty_one(ours, tmp_path):
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to("real")
    import_model(ours, tmp_path / "link")
    assert (tmp_path / "link").is_symlink()
    assert MegaBertForMaskedLM.from_pretrained(tmp_path / "real").config.position != BERT["position"]
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match="file: is not empty; choose another folder"):
        import_model(ours, tmp_path / "file")
