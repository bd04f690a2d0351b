"""Tokenizers with special tokens of RoBERTa's or other names keep their ids and their work from shards to exports."""

import json

import pytest
from transformers import ModernBertConfig, ModernBertForMaskedLM

from data_prep import train_tokenizer
from megabert.convert import from_hf, to_hf
from megabert.convert.hf.tokenizer import copy_tokenizer
from megabert.data.shards.tokenizer import encode, find_tokenizer, read_tokenizer
from megabert.finetune.training import load_tokenizer
from tests.convert.helpers.auto_tokenizer import load_auto_tokenizer
from tests.helpers.foreign.gemma_tokenizer import SIZES
from tests.helpers.foreign.named_tokenizers import KINDS, ROBERTA, write_named_tokenizer
from tests.helpers.foreign.sentencepiece_models import lines_of_every_script, train

BERTS = {role: f"[{role.upper()}]" for role in ROBERTA}


def take(existing, out):
    train_tokenizer.main([f"--existing={existing}", f"--out={out}"])
    return out


@pytest.fixture(scope="module", params=KINDS)
def named(request, texts, tmp_path_factory):
    """A folder with the tokenizer, its names, and those that it has in MegaBERT."""
    folder = tmp_path_factory.mktemp(request.param)
    write_named_tokenizer(folder, KINDS[request.param], texts)
    return folder, KINDS[request.param], ROBERTA if request.param == "roberta" else BERTS


def test_ids_are_those_of_transformers_and_names_in_a_text_are_text(named, texts, tmp_path):
    folder, names, ours_names = named
    theirs, taken = load_auto_tokenizer(folder), take(folder, tmp_path)
    ids = {role: number for number, role in enumerate(names)}
    assert find_tokenizer(taken)[1].special_ids == ids
    assert find_tokenizer(taken)[1].vocab_size == len(theirs)
    lines = [*lines_of_every_script(), *(line for text in texts[:50] for line in text.splitlines()), "", "  a   b"]
    wanted = theirs(lines)["input_ids"]
    again = load_auto_tokenizer(taken)
    assert again(lines)["input_ids"] == wanted
    assert [
        [ids["cls"], *line, ids["sep"]] for line in encode(read_tokenizer(taken / "tokenizer.json"), lines)
    ] == wanted
    assert {role: getattr(again, f"{role}_token") for role in ids} == ours_names
    assert again(f"a {ours_names['mask']} b")["input_ids"] == theirs(f"a {names['mask']} b")["input_ids"]
    text = " ".join([*names.values(), *ours_names.values()])
    assert not set(encode(read_tokenizer(taken / "tokenizer.json"), [text])[0]) & set(ids.values())


def test_a_model_with_it_is_imported_and_written_and_the_shards_tokenizer_is_its_own(named, tmp_path):
    folder, names, ours_names = named
    theirs = load_auto_tokenizer(folder)
    none = {f"{name}_token_id": None for name in ("bos", "eos", "cls", "sep")}
    config = ModernBertConfig(vocab_size=len(theirs), **SIZES, **none, pad_token_id=theirs.pad_token_id)
    ModernBertForMaskedLM(config).save_pretrained(tmp_path / "in")
    theirs.save_pretrained(tmp_path / "in")
    model = from_hf.import_model(tmp_path / "in", tmp_path / "ours")
    taken = take(tmp_path / "in", tmp_path / "taken")
    vocabularies = [read_tokenizer(path / "tokenizer.json").get_vocab() for path in (tmp_path / "ours", taken)]
    assert vocabularies[0] == vocabularies[1], "model.init_from compares them"
    loaded = load_auto_tokenizer(tmp_path / "ours")
    assert loaded.mask_token == ours_names["mask"]
    assert loaded(f"a {ours_names['mask']} b")["input_ids"] == theirs(f"a {names['mask']} b")["input_ids"]
    assert load_tokenizer(tmp_path / "ours", 64).encode("a b").ids == theirs("a b")["input_ids"]
    (tmp_path / "native").mkdir()
    copy_tokenizer(taken, tmp_path / "native", 64)
    to_hf.write_model(tmp_path / "native", model.weights, model.config, "5GB")
    written = json.loads((tmp_path / "native/config.json").read_text())
    ids = {role: number for number, role in enumerate(names)}
    roles = {"bos": "cls", "cls": "cls", "eos": "sep", "sep": "sep", "pad": "pad"}
    assert {role: written[f"{role}_token_id"] for role in roles} == {role: ids[name] for role, name in roles.items()}


def test_no_text_contains_a_special_token_of_a_unigram_model(texts, tmp_path):
    """transformers gives the special pieces of XLM-RoBERTa the score 0, above that of every other segmentation."""
    (tmp_path / "sentencepiece.bpe.model").write_bytes(train(texts, normalization_rule_name="nmt_nfkc"))
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "XLMRobertaTokenizer"}))
    taken = take(tmp_path, tmp_path / "out")
    special = find_tokenizer(taken)[1].special_ids
    assert special["cls"] == 0
    ids = encode(read_tokenizer(taken / "tokenizer.json"), ["a <s> b</s> <pad><mask> [CLS]"])[0]
    assert not set(ids) & {special[role] for role in ("pad", "cls", "sep", "mask")}


def test_what_a_tokenizer_puts_around_a_text_counts_more_than_the_roles_of_its_folder(texts, tmp_path):
    write_named_tokenizer(tmp_path / "in", ROBERTA | {"other": "<cls>"}, texts)
    path = tmp_path / "in/tokenizer_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"cls_token": "<cls>"}))
    assert find_tokenizer(take(tmp_path / "in", tmp_path / "out"))[1].special_ids["cls"] == 0
