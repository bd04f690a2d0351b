"""Damaged folders are refused alike by import, fine-tuning and model.init_from; a finished import is reused."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import BertConfig, BertForMultipleChoice, BertModel

from megabert.convert.check import export_check
from megabert.convert.from_hf import ImportOptions, import_model, read_model
from megabert.convert.to_hf import export_checkpoint
from megabert.data.shards.source import open_source
from megabert.finetune.base_model import prepare_base_model
from megabert.model.modeling_megabert import MegaBertForMaskedLM, MegaBertForMultipleChoice
from megabert.training.checkpointing.initial_weights import load_initial_weights
from tests.convert.helpers.checkpoints import write_checkpoint
from tests.convert.helpers.folders import edit_json
from tests.convert.helpers.small_model import BERT, SHAPE, small_model

WEIGHTS = "model.safetensors"


@pytest.fixture(scope="module")
def folders(corpus, tmp_path_factory) -> dict[str, Path]:
    """An export without the check in another process, its import, and a folder without a record; the same weights."""
    root = tmp_path_factory.mktemp("folders")
    write_checkpoint(root / "run", small_model(), corpus.tokenizer)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(export_check, "run_in_subprocess", lambda folder: {"max_difference": 0.0, "transformers": "0"})
        export_checkpoint(root / "run", root / "export")
    import_model(root / "export", root / "import")
    shutil.copytree(root / "import", root / "plain")
    (root / "plain" / "import.json").unlink()
    return {name: root / name for name in ("export", "import", "plain")}


@pytest.fixture
def readers(corpus, tmp_path) -> dict[str, Callable[[Path], object]]:
    source = open_source(str(corpus.tokens))
    return {
        "import": lambda folder: import_model(folder, tmp_path / "out"),
        "fine-tuning": lambda folder: prepare_base_model(folder, tmp_path / "base"),
        "init_from": lambda folder: load_initial_weights(small_model(seed=1), folder, source),
    }


def flip(file: str) -> Callable[[Path], object]:
    """Change one bit in the last number or word of a file, which stays readable."""

    def damage(folder: Path) -> None:
        data = bytearray((folder / file).read_bytes())
        data[-9] ^= 1
        (folder / file).write_bytes(data)

    return damage


def edit_weights(**changes: Callable[[torch.Tensor], torch.Tensor]) -> Callable[[Path], object]:
    def damage(folder: Path) -> None:
        weights = load_file(folder / WEIGHTS)
        weights |= {name: change(weights[name]) for name, change in changes.items()}
        save_file(weights, folder / WEIGHTS, metadata={"format": "pt"})

    return damage


def cut(size: int) -> Callable[[Path], object]:
    return lambda folder: (folder / WEIGHTS).write_bytes((folder / WEIGHTS).read_bytes()[:size])


NAN = {"decoder.bias": lambda tensor: tensor.index_fill(0, torch.tensor([5]), torch.nan)}
# What is done to a folder; what is said if it records nothing, or None if nothing can tell.
DAMAGES = {
    "a bit of the weights": (flip(WEIGHTS), None),
    "another number of heads": (lambda folder: edit_json(folder / "config.json", num_attention_heads=6), None),
    "another eps": (lambda folder: edit_json(folder / "config.json", layer_norm_eps=1e-5), None),
    "NaN": (edit_weights(**NAN), "decoder.bias has values that are not finite"),
    "another shape": (
        lambda folder: edit_json(folder / "config.json", intermediate_size=48),
        r"mlp.up.weight has shape \(80, 24\), but its config.json implies \(96, 24\)",
    ),
    "fewer layers": (
        lambda folder: edit_json(folder / "config.json", num_hidden_layers=1),
        "has weights of 2 layers, but its config.json has 1",
    ),
    "cut in half": (cut(9000), "model.safetensors: damaged"),
    "cut in its header": (cut(100), "model.safetensors: damaged"),
    "empty": (cut(0), "model.safetensors: damaged"),
    "no weights": (lambda folder: (folder / WEIGHTS).unlink(), "has no model.safetensors and no pytorch_model.bin"),
    "no JSON": (lambda folder: (folder / "config.json").write_text("{"), "config.json: damaged: it is not JSON"),
    "a list": (lambda folder: (folder / "config.json").write_text("[]"), "config.json: damaged: it holds a list"),
    "text for a size": (lambda folder: edit_json(folder / "config.json", hidden_size="24"), "hidden_size is '24'"),
}


@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.parametrize("kind", ["export", "import", "plain"])
def test_every_reader_says_the_same_of_a_damaged_folder(folders, readers, tmp_path, kind, damage):
    folder = shutil.copytree(folders[kind], tmp_path / kind)
    change, message = DAMAGES[damage]
    change(folder)
    if kind != "plain":
        # init_from looks at config.json first: is the folder a MegaBERT at all?
        message = r"(model.safetensors|config.json): (was changed|is missing)" + f"|{message}" * (message is not None)
    for name, read in readers.items():
        if message is None:
            if name == "init_from" and damage != "a bit of the weights":
                with pytest.raises(ValueError, match="is (6|1e-05) in its config.json, (3|1e-12) in this recipe"):
                    read(folder)
            continue
        with pytest.raises(ValueError, match=message) as error:
            read(folder)
        assert str(folder) in str(error.value), name
        assert "\n" not in str(error.value)


@pytest.mark.parametrize("kind", ["export", "import"])
def test_a_change_is_accepted_where_the_record_is_removed_as_the_message_says(folders, readers, tmp_path, kind):
    folder = shutil.copytree(folders[kind], tmp_path / kind)
    edit_weights(**{"decoder.bias": lambda tensor: tensor + 1})(folder)
    record = f"{kind}.json"
    with pytest.raises(ValueError, match=f"was changed .* if the change is yours, remove {record} to use it unchecked"):
        readers["init_from"](folder)
    (folder / record).unlink()
    for read in readers.values():
        read(folder)


@pytest.mark.parametrize("kind", ["export", "import"])
def test_a_damaged_record_is_not_passed_over(folders, tmp_path, kind):
    folder = shutil.copytree(folders[kind], tmp_path / kind)
    for text in ("{", "[]", "{}", '{"files": 3}'):
        (folder / f"{kind}.json").write_text(text)
        with pytest.raises(ValueError, match=f"{kind}.json: is damaged, so the files cannot be compared with it"):
            read_model(folder)


def test_a_record_of_a_newer_version_asks_for_an_update(folders, readers, tmp_path):
    folder = shutil.copytree(folders["import"], tmp_path / "out")
    edit_json(folder / "import.json", format_version=2)
    for read in readers.values():
        with pytest.raises(ValueError, match=r"import\.json: has format_version 2, this .* reads version 1\. Update"):
            read(folder)


def test_what_others_add_to_a_folder_is_no_damage(folders, readers, tmp_path):
    folder = shutil.copytree(folders["export"], tmp_path / "export")
    (folder / "README.md").write_text("mine")
    (folder / "modules.json").write_text("[]")
    (folder / "1_Pooling").mkdir()
    (folder / "1_Pooling" / "config.json").write_text("{}")
    for read in readers.values():
        read(folder)
    imported, expected = read_model(tmp_path / "out").weights, read_model(folders["export"]).weights
    assert imported.keys() == expected.keys()
    assert all(torch.equal(imported[name], expected[name]) for name in expected)


def test_a_finished_import_is_reused_and_a_damaged_one_made_again(run_launcher, folders, tmp_path):
    command = ("convert_from_hf.py", folders["plain"], tmp_path / "out")
    first = run_launcher(*command)
    assert first.code == 0
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "out").iterdir()}
    again = run_launcher(*command)
    assert again.code == 0
    assert again.output.splitlines()[1:] == first.output.splitlines()
    assert "out: is already the import of this folder, and its files are unchanged" in again.output
    assert before == {path: path.stat().st_mtime_ns for path in (tmp_path / "out").iterdir()}
    flip(WEIGHTS)(tmp_path / "out")
    repaired = run_launcher(*command)
    assert repaired.output == first.output
    assert (tmp_path / "out" / WEIGHTS).read_bytes() == (folders["import"] / WEIGHTS).read_bytes()


def test_only_the_same_import_is_reused(folders, tmp_path):
    import_model(folders["plain"], tmp_path / "out")
    with pytest.raises(ValueError, match="is the import of another source, or with other options; choose another"):
        import_model(folders["plain"], tmp_path / "out", ImportOptions(max_length=64))
    with pytest.raises(ValueError, match="is the import of another source, or with other options; choose another"):
        import_model(folders["import"], tmp_path / "out")
    (tmp_path / "out" / "notes.txt").write_text("mine")
    with pytest.raises(ValueError, match="notes.txt: was added to the import there and would be lost"):
        import_model(folders["plain"], tmp_path / "out")
    (tmp_path / "out" / "notes.txt").unlink()
    (tmp_path / "out" / "import.json").unlink()
    with pytest.raises(ValueError, match="out: is not empty; choose another folder"):
        import_model(folders["plain"], tmp_path / "out")


def test_initialized_parameters_stay_named_after_an_import(tmp_path):
    BertModel(BertConfig(**SHAPE)).save_pretrained(tmp_path / "bert")
    first = import_model(tmp_path / "bert", tmp_path / "one")
    assert len(first.initialized) == 5
    second = import_model(tmp_path / "one", tmp_path / "two")
    assert second.initialized == first.initialized
    assert "`decoder.bias`" in (tmp_path / "two" / "README.md").read_text()


@pytest.mark.parametrize("prefix", ["module.", "_orig_mod.", "module._orig_mod.", "_fsdp_wrapped_module.", "model."])
@pytest.mark.parametrize("changes", [BERT, {}], ids=["bert", "mosaicbert"])
def test_the_prefixes_of_wrappers_are_removed(tmp_path, prefix, changes):
    model = small_model(**changes)
    model.save_pretrained(tmp_path)
    weights = {f"{prefix}{name}": tensor for name, tensor in load_file(tmp_path / WEIGHTS).items()}
    save_file(weights, tmp_path / WEIGHTS, metadata={"format": "pt"})
    read = read_model(tmp_path)
    assert read.initialized == read.unused == []
    assert all(torch.equal(read.weights[name], parameter) for name, parameter in model.named_parameters())
    save_file(weights | {"decoder.bias": torch.zeros(832)}, tmp_path / WEIGHTS, metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"decoder.bias is there twice, with and without the prefix of a wrapper"):
        read_model(tmp_path)


@pytest.mark.parametrize("prefix", ["student.", "0.net.", "_forward_module.module.", "encoder.", "base_model.model."])
@pytest.mark.parametrize("changes", [BERT, {}], ids=["bert", "mosaicbert"])
def test_a_prefix_that_all_names_share_is_removed(tmp_path, prefix, changes):
    model = small_model(**changes)
    model.save_pretrained(tmp_path)
    saved = load_file(tmp_path / WEIGHTS)
    weights = {f"{prefix}{name}": tensor for name, tensor in saved.items()}
    save_file(weights, tmp_path / WEIGHTS, metadata={"format": "pt"})
    read = read_model(tmp_path)
    assert read.initialized == read.unused == []
    assert all(torch.equal(read.weights[name], parameter) for name, parameter in model.named_parameters())
    # Of two models in one file, neither is chosen.
    both = weights | {f"teacher.{name}": tensor.clone() for name, tensor in saved.items()}
    save_file(both, tmp_path / WEIGHTS, metadata={"format": "pt"})
    with pytest.raises(ValueError, match="and the weights of another model if it has two"):
        read_model(tmp_path)


def test_a_multiple_choice_model_is_imported_and_gives_the_same_scores(tmp_path):
    theirs = BertForMultipleChoice(BertConfig(**SHAPE)).eval()
    theirs.save_pretrained(tmp_path / "in")
    import_model(tmp_path / "in", tmp_path / "one")
    import_model(tmp_path / "one", tmp_path / "two")
    ours = MegaBertForMultipleChoice.from_pretrained(tmp_path / "two").eval()
    ids = torch.randint(5, 800, (2, 3, 9))
    with torch.no_grad():
        torch.testing.assert_close(ours(ids).logits, theirs(ids).logits, rtol=0, atol=1e-5)


def test_a_tokenizer_is_given_to_a_model_without_one(corpus, tmp_path):
    """As Mosaic's published folders: every row stays, and another tokenizer is refused."""
    model = small_model()
    model.save_pretrained(tmp_path / "in")
    options = ImportOptions(tokenizer=str(corpus.tokenizer))
    imported = import_model(tmp_path / "in", tmp_path / "out", options)
    assert imported.vocabulary == (
        f"{tmp_path / 'in'} has no tokenizer: {corpus.tokenizer} was taken for the one that it was trained with, "
        "and no row was changed"
    )
    assert (tmp_path / "out" / "tokenizer.json").read_bytes() == (corpus.tokenizer / "tokenizer.json").read_bytes()
    loaded = MegaBertForMaskedLM.from_pretrained(tmp_path / "out")
    assert all(torch.equal(p, q) for p, q in zip(loaded.parameters(), model.parameters(), strict=True))
    # A model that names no padding token contradicts none.
    small_model(pad_token_id=None).save_pretrained(tmp_path / "unpadded")
    assert import_model(tmp_path / "unpadded", tmp_path / "also", options).vocabulary is not None
    small_model(vocab_size=2000).save_pretrained(tmp_path / "larger")
    message = f"{corpus.tokenizer}: has .* tokens .* cannot be the one .* first copy that one into the folder"
    with pytest.raises(ValueError, match=message):
        import_model(tmp_path / "larger", tmp_path / "other", options)
    # Follow the advice: with its own tokenizer in the folder, the vocabulary can change.
    tokenizer = json.loads((corpus.tokenizer / "tokenizer.json").read_text())
    (tmp_path / "larger" / "tokenizer.json").write_text(json.dumps(tokenizer))
    assert "tokens kept" in str(import_model(tmp_path / "larger", tmp_path / "other", options).vocabulary)


def test_the_name_of_a_model_on_the_hub_is_answered_with_how_to_get_it(run_launcher, tmp_path):
    done = run_launcher("convert_from_hf.py", "bert-base-uncased", tmp_path / "out")
    assert done.code == 1
    assert "bert-base-uncased: no such folder." in done.output
    assert "hf download bert-base-uncased --local-dir FOLDER" in done.output


def test_what_can_be_no_model_on_the_hub_is_not_looked_for_there(run_launcher, tmp_path):
    (tmp_path / "model.safetensors").write_bytes(b"")
    done = run_launcher("convert_from_hf.py", tmp_path / "model.safetensors", tmp_path / "out")
    assert "model.safetensors: is a file, expected the folder of a model" in done.output
    done = run_launcher("convert_from_hf.py", tmp_path / "none", tmp_path / "out")
    assert done.output.endswith("none: no such folder.\n")
