"""Imported tokenizers give the ids that transformers gives for the same folder."""

import json
from pathlib import Path

import pytest
import transformers
from packaging.version import Version
from tokenizers import Tokenizer
from transformers import BertTokenizer, RobertaTokenizer

from megabert.convert.from_hf import ImportOptions, import_model
from megabert.convert.hf.tokenizer import copy_tokenizer, read_hf_tokenizer
from tests.convert.helpers.auto_tokenizer import load_auto_tokenizer
from tests.convert.helpers.small_model import small_model

TOKENS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "a\u2028b", "\u0085y", "\u2028z", "caf\u00e9", "cafe", "Cafe",
          "Caf\u00e9", "\u6771", "\u4eac", "##\u4eac", "the", "##s", "x", "##\u001cd", "last"]  # fmt: skip
TEXTS = [
    "Caf\u00e9 caf\u00e9 Cafe cafe",
    "\u6771\u4eac the \u6771 \u4eac",
    "xs [MASK] <new> the<new>last <other>",
    "a\u2028b x\u0085x \u001c",
]


def write_vocab(folder: Path, settings: dict | None = None, **files: dict) -> Path:
    folder.mkdir(parents=True)
    (folder / "vocab.txt").write_text("\n".join(TOKENS) + "\n", encoding="utf-8")
    for name, content in {"tokenizer_config": settings, **files}.items():
        if content is not None:
            (folder / f"{name}.json").write_text(json.dumps(content))
    return folder


def test_white_space_at_the_ends_of_lines_is_no_part_of_a_piece(tmp_path):
    """The class of BERT in transformers 5 reads so, and only it: in 4.x such a piece matches no text."""
    lines = [*TOKENS[:5], "cat ", " dog", "##s\t", "\u3000", "x\u00a0\u2028", "y\u001c", "a\rb", "", "the\r", "last"]
    folder = write_vocab(tmp_path / "in", settings={"tokenizer_class": "BertTokenizer"})
    (folder / "vocab.txt").write_bytes("\n".join(lines).encode())
    ours = read_hf_tokenizer(folder)
    expected = dict(
        zip(
            ("cat", " dog", "##s", "x", "y\u001c", "a\rb", "", "the", "last"), (5, 6, 7, 9, *range(10, 15)), strict=True
        )
    )
    assert ours.get_vocab() == dict(zip(TOKENS[:5], range(5), strict=True)) | expected
    if Version(transformers.__version__) >= Version("5"):
        theirs = BertTokenizer.from_pretrained(folder)
        assert theirs.get_vocab() == ours.get_vocab()
        assert theirs("cats the x").input_ids == ours.encode("cats the x").ids
    (folder / "vocab.txt").write_text("\n".join([*TOKENS[:5], "cat", "cat "]))
    with pytest.raises(ValueError, match=r"vocab\.txt: lists 'cat' twice"):
        read_hf_tokenizer(folder)


NEW, OTHER = len(TOKENS), len(TOKENS) + 1
SETTINGS = {
    "no settings": {},
    "cased": {"settings": {"do_lower_case": False, "tokenizer_class": "BertTokenizer"}},
    "accents kept": {"settings": {"do_lower_case": True, "strip_accents": False}},
    "accents stripped, case kept": {"settings": {"do_lower_case": False, "strip_accents": True}},
    "Chinese characters kept together": {"settings": {"tokenize_chinese_chars": False}},
    "added_tokens.json": {"added_tokens": {"<other>": OTHER, "<new>": NEW}},
    "added_tokens_decoder": {
        "settings": {
            "do_lower_case": False,
            "tokenizer_class": "BertTokenizerFast",
            "added_tokens_decoder": {
                str(TOKENS.index("[MASK]")): {"content": "[MASK]", "special": True},
                str(NEW): {"content": "<new>", "special": False, "normalized": False, "lstrip": True, "rstrip": False},
                str(OTHER): {"content": "<other>", "special": True, "normalized": False, "single_word": False},
            },
        }
    },
    "special_tokens_map.json": {
        "special_tokens_map": {"mask_token": {"content": "[MASK]", "lstrip": True}, "unk_token": "x"}
    },
}


@pytest.mark.parametrize("case", SETTINGS)
def test_a_vocabulary_gives_the_ids_of_transformers(tmp_path, case):
    folder = write_vocab(tmp_path / "in", **SETTINGS[case])
    theirs = BertTokenizer.from_pretrained(folder)
    (tmp_path / "out").mkdir()
    copy_tokenizer(folder, tmp_path / "out", 512)
    ours = Tokenizer.from_file(str(tmp_path / "out" / "tokenizer.json"))
    again = load_auto_tokenizer(tmp_path / "out")
    for text in TEXTS:
        expected = theirs(text)["input_ids"]
        assert ours.encode(text).ids == expected, text
        assert again(text)["input_ids"] == expected, text
    assert read_hf_tokenizer(folder).get_vocab() == theirs.get_vocab()
    assert again.pad_token == "[PAD]"
    assert again.mask_token == "[MASK]"


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({"settings": {"do_lower_case": "no"}}, "do_lower_case is 'no', expected true or false"),
        ({"added_tokens": {"<new>": [NEW]}}, "is not an object of tokens with their ids"),
        ({"added_tokens": {"<new>": NEW + 5}}, f"'<new>' has the id {NEW + 5}, but vocab.txt makes it {NEW}"),
        ({"settings": {"added_tokens_decoder": {"x": "<new>"}}}, "is not an object of tokens with their ids"),
        ({"settings": {"added_tokens_decoder": {NEW: {"content": 7}}}}, "is not a token, expected"),
        ({"settings": {"mask_token": ["[MASK]"]}}, "is not a token, expected"),
        ({"settings": {"additional_special_tokens": "<new>"}}, "additional_special_tokens is a str, expected a list"),
        ({"settings": {"cls_token": "<s>"}}, "vocab.txt: has no <s>"),
    ],
)
def test_invalid_settings_are_refused(tmp_path, files, message):
    with pytest.raises(ValueError, match=message):
        read_hf_tokenizer(write_vocab(tmp_path / "in", **files))


def test_a_vocabulary_that_is_not_text_is_refused(tmp_path):
    (tmp_path / "vocab.txt").write_bytes(b"[CLS]\n\xff\xfe\n")
    with pytest.raises(ValueError, match="vocab.txt: is not UTF-8"):
        read_hf_tokenizer(tmp_path)


def write_wordpiece(path: Path, *more: str, **truncation: int) -> Path:
    tokenizer = read_hf_tokenizer(write_vocab(path.parent / f"vocabulary-of-{path.stem}"))
    tokenizer.add_tokens(list(more))
    if truncation:
        tokenizer.enable_truncation(**truncation)
        tokenizer.enable_padding(length=4)
    path.parent.mkdir(exist_ok=True)
    tokenizer.save(str(path))
    return path


def test_a_tokenizer_file_is_used_without_the_other_files_in_its_folder(tmp_path):
    small_model().save_pretrained(tmp_path / "in")
    write_wordpiece(tmp_path / "in" / "tokenizer.json")
    write_wordpiece(tmp_path / "tokenizers" / "tokenizer.json", "neighbour")
    (tmp_path / "tokenizers" / "tokenizer_config.json").write_text(json.dumps({"mask_token": "neighbour"}))
    wanted = write_wordpiece(tmp_path / "tokenizers" / "wanted.json", "one", "two")
    model = import_model(
        tmp_path / "in", tmp_path / "out", ImportOptions(tokenizer=str(wanted), pad_vocab_to_multiple_of=1)
    )
    assert model.config.vocab_size == len(TOKENS) + 2
    assert (tmp_path / "out" / "tokenizer.json").read_bytes() == wanted.read_bytes()
    tokenizer = load_auto_tokenizer(tmp_path / "out")
    assert tokenizer("one two")["input_ids"][1:-1] == [len(TOKENS), len(TOKENS) + 1]
    assert tokenizer.mask_token == "[MASK]"


def test_a_change_of_length_removes_the_tokenizers_own_limits(tmp_path):
    small_model().save_pretrained(tmp_path / "in")
    write_wordpiece(tmp_path / "in" / "tokenizer.json", max_length=6)
    import_model(tmp_path / "in", tmp_path / "out", ImportOptions(max_length=96))
    raw = json.loads((tmp_path / "out" / "tokenizer.json").read_text())
    assert raw["truncation"] is raw["padding"] is None
    long = "the x " * 60
    assert len(Tokenizer.from_file(str(tmp_path / "out" / "tokenizer.json")).encode(long).ids) == 122
    assert len(load_auto_tokenizer(tmp_path / "out")(long, truncation=True)["input_ids"]) == 96


@pytest.mark.parametrize("settings", [{}, {"truncation_side": "right", "padding_side": "right"}])
def test_texts_are_cut_and_padded_on_the_side_that_the_source_says(tmp_path, settings):
    (tmp_path / "in").mkdir()
    (tmp_path / "out").mkdir()
    path = tmp_path / "in" / "tokenizer.json"
    write_wordpiece(path)
    tokenizer = Tokenizer.from_file(str(path))
    tokenizer.enable_truncation(5, direction="left")
    tokenizer.enable_padding(direction="left")
    tokenizer.save(str(path))
    (tmp_path / "in/tokenizer_config.json").write_text(
        json.dumps(settings | {"pad_token": "[PAD]", "tokenizer_class": "PreTrainedTokenizerFast"})
    )
    copy_tokenizer(tmp_path / "in", tmp_path / "out", 64)
    theirs, ours = (load_auto_tokenizer(tmp_path / name) for name in ("in", "out"))
    sides = (ours.truncation_side, ours.padding_side)
    assert sides == (theirs.truncation_side, theirs.padding_side) == (("right",) * 2 if settings else ("left",) * 2)


def test_settings_that_name_code_are_not_copied(tmp_path):
    small_model().save_pretrained(tmp_path / "in")
    write_wordpiece(tmp_path / "in" / "tokenizer.json")
    config = {
        "auto_map": {"AutoTokenizer": ["evil.Tokenizer", None]},
        "tokenizer_class": "EvilTokenizer",
        "chat_template": "{{x}}",
    }
    (tmp_path / "in" / "tokenizer_config.json").write_text(json.dumps(config | {"do_lower_case": False}))
    raw = json.loads((tmp_path / "in" / "config.json").read_text())
    raw |= {
        "custom_pipelines": {"evil": {"impl": "evil.Pipeline"}},
        "torch_dtype": "float99",
        "_name_or_path": "/home/x",
    }
    (tmp_path / "in" / "config.json").write_text(json.dumps(raw))
    import_model(tmp_path / "in", tmp_path / "out")
    settings = json.loads((tmp_path / "out" / "tokenizer_config.json").read_text())
    assert settings.keys() & (config.keys() | {"do_lower_case"}) == {"tokenizer_class", "do_lower_case"}
    assert settings["tokenizer_class"] == "PreTrainedTokenizerFast"
    written = json.loads((tmp_path / "out" / "config.json").read_text())
    assert "custom_pipelines" not in written
    assert "float99" not in written.values()
    assert "/home/x" not in written.values()


@pytest.mark.parametrize("split", [True, False])
def test_whether_the_names_of_special_tokens_are_split_stays_as_it_was(tmp_path, split):
    write_wordpiece(tmp_path / "tokenizer.json")
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "split_special_tokens": split, "mask_token": "[MASK]"}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings))
    (tmp_path / "out").mkdir()
    copy_tokenizer(tmp_path, tmp_path / "out", 40)
    theirs, ours = (load_auto_tokenizer(folder) for folder in (tmp_path, tmp_path / "out"))
    ids = theirs("[MASK] the")["input_ids"]
    assert ours("[MASK] the")["input_ids"] == ids
    assert (theirs.mask_token_id in ids) != split


def make_roberta(folder: Path, **settings: bool) -> RobertaTokenizer:
    pieces = [*"<s> <pad> </s> <unk>".split(), *"abc", "\u0120", "\u0120a", "ab", "<mask>"]
    vocabulary = {piece: number for number, piece in enumerate(pieces)}
    tokenizer = RobertaTokenizer(vocab=vocabulary, merges=[("\u0120", "a"), ("a", "b")], **settings)
    tokenizer.save_pretrained(folder)
    return tokenizer


@pytest.mark.parametrize("prefix", [True, False])
@pytest.mark.parametrize("says", [True, False, None])
def test_a_space_before_a_text_is_put_as_robertas_class_does(tmp_path, prefix, says):
    """Its tokenizer_config.json counts, not its tokenizer.json."""
    folder, out = tmp_path / "in", tmp_path / "out"
    make_roberta(folder, add_prefix_space=prefix)
    path = folder / "tokenizer_config.json"
    settings = {name: value for name, value in json.loads(path.read_text()).items() if name != "add_prefix_space"}
    path.write_text(json.dumps(settings | ({} if says is None else {"add_prefix_space": says})))
    theirs = load_auto_tokenizer(folder)
    out.mkdir()
    copy_tokenizer(folder, out, 512)
    ours, again = Tokenizer.from_file(str(out / "tokenizer.json")), load_auto_tokenizer(out)
    assert (theirs("a").input_ids == theirs(" a").input_ids) == bool(says)
    for text in ("a", "ab c", " b", "a <mask> b", "a<mask>"):
        assert ours.encode(text).ids == again(text).input_ids == theirs(text).input_ids, text
    assert again("a", "b").input_ids == theirs("a", "b").input_ids
    for role in ("pad", "unk", "cls", "sep", "mask", "bos", "eos"):
        assert getattr(again, f"{role}_token_id") == getattr(theirs, f"{role}_token_id"), role
