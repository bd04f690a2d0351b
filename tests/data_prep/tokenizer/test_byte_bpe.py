"""Byte-level BPE, as in ModernBERT: taken as it is, and trained; ids are transformers' on lines of every script."""

import json
from typing import Any

import pytest
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from data_prep import train_tokenizer
from megabert.data.shards.tokenizer import read_tokenizer
from tests.convert.helpers.auto_tokenizer import load_auto_tokenizer
from tests.helpers.foreign.sentencepiece_models import lines_of_every_script

ROLES = {"unk": "[UNK]", "cls": "[CLS]", "sep": "[SEP]", "pad": "[PAD]", "mask": "[MASK]"}


@pytest.fixture(scope="module")
def modernbert(texts, tmp_path_factory):
    """A tokenizer with the parts of ModernBERT's: special tokens after the pieces, a mask that takes a space."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    tokenizer.train_from_iterator(
        texts, trainers.BpeTrainer(vocab_size=700, initial_alphabet=alphabet, show_progress=False)
    )
    tokenizer.add_tokens(["|||IP_ADDRESS|||", "   "])
    tokenizer.add_special_tokens([AddedToken(name, lstrip=name == "[MASK]", special=True) for name in ROLES.values()])
    ids = [(name, tokenizer.token_to_id(name)) for name in ("[CLS]", "[SEP]")]
    pair = "[CLS]:0 $A:0 [SEP]:0 $B:0 [SEP]:0"
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS]:0 $A:0 [SEP]:0", pair=pair, special_tokens=ids
    )
    folder = tmp_path_factory.mktemp("modernbert")
    names: dict[str, Any] = {f"{role}_token": name for role, name in ROLES.items()}
    names["model_input_names"] = ["input_ids", "attention_mask"]
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, **names).save_pretrained(folder)
    return folder


def test_modernberts_tokenizer_is_taken_as_it_is(modernbert, tmp_path, texts):
    train_tokenizer.main([f"--existing={modernbert}", f"--out={tmp_path}"])
    ours, theirs = read_tokenizer(tmp_path / "tokenizer.json"), load_auto_tokenizer(modernbert)
    again = load_auto_tokenizer(tmp_path)
    lines = [*lines_of_every_script(), *(line for text in texts for line in text.splitlines())][:10_000]
    wanted = theirs(lines)["input_ids"]
    assert [encoding.ids for encoding in ours.encode_batch(lines)] == wanted
    assert again(lines)["input_ids"] == wanted
    assert ours.get_vocab() == theirs.get_vocab()


def test_byte_bpe_is_trained_and_has_no_unknown_text(corpus, tmp_path):
    flags = ["--model=byte_bpe", "--vocab_size=600", "--sample_bytes=100000"]
    train_tokenizer.main([f"--source={corpus.jsonl}", f"--out={tmp_path}", *flags, "--lowercase=false"])
    tokenizer = read_tokenizer(tmp_path / "tokenizer.json")
    assert tokenizer.get_vocab_size() == 600
    unknown = tokenizer.token_to_id("[UNK]")
    lines = lines_of_every_script()
    encoded = tokenizer.encode_batch(lines)
    assert not any(unknown in encoding.ids for encoding in encoded)
    composed = [tokenizer.normalizer.normalize_str(line) for line in lines]
    assert tokenizer.decode_batch([encoding.ids for encoding in encoded]) == composed
    assert load_auto_tokenizer(tmp_path)(lines)["input_ids"] == [encoding.ids for encoding in encoded]
    assert json.loads((tmp_path / "tokenizer.json").read_text())["model"]["type"] == "BPE"


def test_too_few_pieces_and_an_empty_corpus_are_refused(tmp_path):
    (tmp_path / "corpus.txt").write_text("\n")
    flags = [f"--source={tmp_path / 'corpus.txt'}", f"--out={tmp_path / 'out'}", "--model=byte_bpe"]
    with pytest.raises(ValueError, match="200 pieces are fewer than all bytes. Pass --vocab-size 261 or more"):
        train_tokenizer.main([*flags, "--vocab_size=200"])
    with pytest.raises(ValueError, match="has no text to train on. Use more text"):
        train_tokenizer.main([*flags, "--vocab_size=261"])
