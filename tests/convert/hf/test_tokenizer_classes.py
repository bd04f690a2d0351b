"""Tokenizers of every class of transformers that a model with BERT's layers may have: its ids, or a refusal."""

import json
from itertools import product
from pathlib import Path

import pytest
import transformers
from packaging.version import Version
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
from transformers import AutoTokenizer

from data_prep import train_tokenizer
from megabert.convert.hf.tokenizer import copy_tokenizer, read_hf_tokenizer
from tests.helpers.foreign.sentencepiece_models import lines_of_every_script
from tests.kernels.helpers.cases import cases

ROLES = ("pad", "unk", "cls", "sep", "mask")
BERT = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")
ROBERTA = ("<pad>", "<unk>", "<s>", "</s>", "<mask>")
NAMES = {"Funnel": ("<pad>", "<unk>", "<cls>", "<sep>", "<mask>"), "MPNet": ("<pad>", "[UNK]", "<s>", "</s>", "<mask>")}
LINES = [
    *lines_of_every_script(),
    "",
    " a",
    "The Caf\u00e9 of M\u00dcNCHEN, 東京 don't_stop",
    "a\tb\nc",
    "e\u0301 \u00c9",
]
LETTERS = sorted({letter for line in LINES for letter in line + line.lower() if not letter.isspace()} | {"e", "u"})
# Those of a tokenizer_config.json, and of the normalizer in tokenizer.json.
SETTINGS = [
    {},
    {"do_lower_case": True},
    {"do_lower_case": False},
    {"strip_accents": None},
]
STATES = [
    {"lowercase": True, "strip_accents": None, "handle_chinese_chars": True},
    {"lowercase": False, "strip_accents": None, "handle_chinese_chars": True},
    {"lowercase": True, "strip_accents": False, "handle_chinese_chars": False},
]
WORDPIECE = "Bert ConvBert DistilBert Electra LayoutLM Lxmert MobileBert RetriBert Splinter SqueezeBert MPNet Funnel"
SOME = [("Bert", ""), ("ConvBert", "Fast"), ("Funnel", "")]
BYTES = "Roberta Longformer Bart LED Mvp Deberta Luke GPT2 Blenderbot"

pytestmark = pytest.mark.skipif(
    Version(transformers.__version__) < Version("5"), reason="transformers 4 reads some classes in other ways"
)


def make_wordpiece(names: tuple[str, ...], state: dict) -> Tokenizer:
    pieces = dict.fromkeys([*names, *LETTERS, *(f"##{letter}" for letter in LETTERS), "the", "The"])
    ids = {piece: number for number, piece in enumerate(pieces)}
    tokenizer = Tokenizer(models.WordPiece(ids, unk_token=names[1]))
    tokenizer.normalizer = normalizers.BertNormalizer(clean_text=True, **state)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece()
    tokenizer.add_special_tokens(list(names))
    cls, sep = names[2:4]
    tokenizer.post_processor = processors.BertProcessing((sep, ids[sep]), (cls, ids[cls]))
    return tokenizer


def make_bytes(prefix: bool) -> Tokenizer:
    pieces = [*ROBERTA, *sorted(pre_tokenizers.ByteLevel.alphabet()), "\u0120t", "he"]
    ids = {piece: number for number, piece in enumerate(pieces)}
    tokenizer = Tokenizer(models.BPE(ids, [("\u0120", "t"), ("h", "e")]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=prefix)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(list(ROBERTA))
    tokenizer.post_processor = processors.RobertaProcessing(("</s>", ids["</s>"]), ("<s>", ids["<s>"]), True, prefix)
    return tokenizer


def write(folder: Path, tokenizer: Tokenizer, names: tuple[str, ...], **settings: object) -> Path:
    folder.mkdir(parents=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    roles = {f"{role}_token": name for role, name in zip(ROLES, names, strict=True)}
    (folder / "tokenizer_config.json").write_text(json.dumps(roles | settings))
    return folder


def assert_same_ids(folder: Path) -> None:
    """The tokenizer that encodes a corpus, and the one in an import, give transformers' ids."""
    wanted = AutoTokenizer.from_pretrained(folder)(LINES)["input_ids"]
    ours = read_hf_tokenizer(folder)
    assert [encoding.ids for encoding in ours.encode_batch(LINES)] == wanted
    out = folder.with_name(f"{folder.name}-out")
    out.mkdir()
    copy_tokenizer(folder, out, 512)
    assert AutoTokenizer.from_pretrained(out)(LINES)["input_ids"] == wanted
    copied = Tokenizer.from_file(str(out / "tokenizer.json"))
    assert [encoding.ids for encoding in copied.encode_batch(LINES)] == wanted


@pytest.mark.parametrize(("name", "fast"), cases(SOME, product(WORDPIECE.split(), ("", "Fast"))))
def test_a_class_of_wordpieces_gives_its_ids_whatever_its_files_say(name, fast, tmp_path):
    names = NAMES.get(name, BERT)
    for i, state in enumerate(STATES):
        tokenizer = make_wordpiece(names, state)
        for j, settings in enumerate(SETTINGS):
            assert_same_ids(
                write(tmp_path / f"{i}{j}", tokenizer, names, tokenizer_class=f"{name}Tokenizer{fast}", **settings)
            )


@pytest.mark.parametrize(
    ("name", "prefix"), cases([("Roberta", True), ("Blenderbot", False)], product(BYTES.split(), (True, False)))
)
def test_a_class_of_bytes_puts_a_space_before_a_text_as_it_does(name, prefix, tmp_path):
    for says in (None, True, False):
        settings = {} if says is None else {"add_prefix_space": says}
        assert_same_ids(
            write(tmp_path / str(says), make_bytes(prefix), ROBERTA, tokenizer_class=f"{name}Tokenizer", **settings)
        )


@pytest.mark.parametrize("kind", ["bert", "distilbert", "electra", "roberta"])
def test_a_tokenizer_that_names_no_class_has_that_of_the_model_beside_it(kind, tmp_path):
    tokenizer = make_bytes(True) if kind == "roberta" else make_wordpiece(BERT, STATES[1])
    folder = write(tmp_path / "in", tokenizer, ROBERTA if kind == "roberta" else BERT)
    (folder / "config.json").write_text(json.dumps({"model_type": kind}))
    assert_same_ids(folder)


@pytest.mark.parametrize("name", ["Funnel", "MPNet"])
def test_a_vocab_txt_of_another_class_is_refused_and_the_advice_works(name, tmp_path):
    names = NAMES[name]
    cls = getattr(transformers, f"{name}Tokenizer")
    (tmp_path / "vocab.txt").write_text(
        "\n".join([*names, "<s>" if name == "Funnel" else "x", "</s>"[:4], "the", "##s"])
    )
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": f"{name}Tokenizer"}))
    with pytest.raises(ValueError, match=rf"vocab.txt: .* {name}Tokenizer.from_pretrained\(FOLDER\).save_pretrained"):
        read_hf_tokenizer(tmp_path)
    cls.from_pretrained(tmp_path).save_pretrained(tmp_path)
    train_tokenizer.main([f"--existing={tmp_path}", f"--out={tmp_path / 'out'}"])
    theirs = AutoTokenizer.from_pretrained(tmp_path)("the thes")["input_ids"]
    assert Tokenizer.from_file(str(tmp_path / "out/tokenizer.json")).encode("the thes").ids == theirs
