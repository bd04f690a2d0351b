"""Gemma's tokenizer, as in mmBERT: its special tokens keep their names and ids, and its bytes and spaces their ids."""

import json
import shutil

import pytest
from transformers import ModernBertConfig, ModernBertForMaskedLM

from data_prep import train_tokenizer
from data_prep.writing.metadata import plain_tokenizer_config
from megabert.convert import from_hf, to_hf
from megabert.convert.hf.tokenizer import copy_tokenizer
from megabert.data.shards.tokenizer import TokenizerFile, encode, find_tokenizer, read_tokenizer
from megabert.files.hashing import file_sha256
from megabert.finetune.training import load_tokenizer
from tests.convert.helpers.auto_tokenizer import load_auto_tokenizer
from tests.helpers.foreign.gemma_tokenizer import ROLES, SIZES, write_gemma_tokenizer
from tests.helpers.foreign.sentencepiece_models import lines_of_every_script

IDS = {"pad": 0, "sep": 1, "cls": 2, "unk": 3, "mask": 4}


@pytest.fixture(scope="module")
def gemma(texts, tmp_path_factory):
    folder = tmp_path_factory.mktemp("gemma")
    write_gemma_tokenizer(folder, texts)
    return folder


@pytest.fixture(scope="module")
def taken(gemma, tmp_path_factory):
    folder = tmp_path_factory.mktemp("taken")
    train_tokenizer.main([f"--existing={gemma}", f"--out={folder}"])
    return folder


@pytest.mark.parametrize(
    "tokenizer_class",
    ["GemmaTokenizer", *(pytest.param(name, marks=pytest.mark.nightly) for name in ("GemmaTokenizerFast", None))],
)
def test_ids_and_names_are_those_of_transformers(gemma, tmp_path, texts, tokenizer_class):
    shutil.copytree(gemma, tmp_path / "in")
    settings = json.loads((gemma / "tokenizer_config.json").read_text()) | {"tokenizer_class": tokenizer_class}
    (tmp_path / "in" / "tokenizer_config.json").write_text(json.dumps(settings))
    train_tokenizer.main([f"--existing={tmp_path / 'in'}", f"--out={tmp_path / 'out'}"])
    theirs, again = (load_auto_tokenizer(tmp_path / name) for name in ("in", "out"))
    ours, info = read_tokenizer(tmp_path / "out/tokenizer.json"), find_tokenizer(tmp_path / "out")[1]
    assert info.special_ids == IDS
    assert ours.get_vocab() == theirs.get_vocab()
    lines = [*lines_of_every_script(), *(line for text in texts for line in text.splitlines())][:10_000]
    lines += ["[CLS] [MASK] <s>a</s><2mass>", "", "  a   b"]
    wanted = theirs(lines)["input_ids"]
    assert [[IDS["cls"], *ids, IDS["sep"]] for ids in encode(ours, lines)] == wanted
    assert again([*lines, "a <mask> b"])["input_ids"] == [*wanted, theirs("a <mask> b")["input_ids"]]
    assert {role: getattr(again, f"{role}_token") for role in IDS} == {role: ROLES[role] for role in IDS}


def test_the_names_of_special_tokens_in_a_corpus_are_text(taken):
    assert not set(encode(read_tokenizer(taken / "tokenizer.json"), ["<mask> <bos><pad>"])[0]) & {0, 1, 2, 4}


def test_a_bare_tokenizer_json_is_taken_and_gets_its_names(gemma, taken, tmp_path):
    train_tokenizer.main([f"--existing={gemma / 'tokenizer.json'}", f"--out={tmp_path}"])
    assert find_tokenizer(tmp_path)[1] == find_tokenizer(taken)[1]
    file = TokenizerFile(path := gemma / "tokenizer.json", file_sha256(path))
    assert json.loads(plain_tokenizer_config(file))["mask_token"] == "<mask>"


def test_other_roles_than_the_names_say_are_followed(gemma, tmp_path):
    shutil.copytree(gemma, tmp_path / "in")
    path = tmp_path / "in" / "tokenizer_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"mask_token": "<unk>", "unk_token": "<mask>"}))
    train_tokenizer.main([f"--existing={tmp_path / 'in'}", f"--out={tmp_path / 'out'}"])
    assert find_tokenizer(tmp_path / "out")[1].special_ids["cls"] == IDS["cls"]
    assert load_auto_tokenizer(tmp_path / "out").mask_token == "[MASK]"


def test_a_model_with_it_is_imported_written_and_fine_tuned_with_its_names(gemma, taken, tmp_path):
    theirs = load_auto_tokenizer(gemma)
    none = {f"{name}_token_id": None for name in ("bos", "eos", "cls", "sep")}
    config = ModernBertConfig(vocab_size=len(theirs), **SIZES, **none, pad_token_id=0)
    ModernBertForMaskedLM(config).save_pretrained(tmp_path / "in")
    shutil.copytree(gemma, tmp_path / "in", dirs_exist_ok=True)
    model = from_hf.import_model(tmp_path / "in", tmp_path / "out")
    assert (tmp_path / "out/tokenizer.json").read_bytes() == (gemma / "tokenizer.json").read_bytes()
    assert load_tokenizer(tmp_path / "out", 64).encode("a b").ids == theirs("a b")["input_ids"]
    (tmp_path / "native").mkdir()
    copy_tokenizer(taken, tmp_path / "native", 64)
    to_hf.write_model(tmp_path / "native", model.weights, model.config, "5GB")
    config = json.loads((tmp_path / "native/config.json").read_text())
    names = {"bos": 2, "cls": 2, "eos": 1, "sep": 1, "pad": 0}
    assert {name: config[f"{name}_token_id"] for name in names} == names
    assert load_auto_tokenizer(tmp_path / "native").mask_token_id == IDS["mask"]
