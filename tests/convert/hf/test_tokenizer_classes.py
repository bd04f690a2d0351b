"""Tokenizers of every class of transformers that a model with BERT's layers may have: its ids, or a refusal."""

import json
from itertools import product
from pathlib import Path

import pytest
import transformers
from packaging.version import Version
from sentencepiece import SentencePieceNormalizer
from sentencepiece.sentencepiece_model_pb2 import NormalizerSpec
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors

from data_prep import train_tokenizer
from megabert.convert.hf.tokenizer import copy_tokenizer, read_hf_tokenizer
from tests.convert.helpers.auto_tokenizer import load_auto_tokenizer
from tests.helpers.cases import cases
from tests.helpers.foreign.sentencepiece_models import lines_of_every_script

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
    "a ",
    "a\n",
    "A  b. ",
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
SPACES = [pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Metaspace(prepend_scheme="always")]
# Normalizers and pre-tokenizers of unigram models. The second is what transformers 4.3 saved of XLM-RoBERTa.
UNIGRAMS = {
    "cased": ([], pre_tokenizers.Sequence(SPACES)),
    "precompiled": ([normalizers.Replace(Regex(" {2,}"), " ")], pre_tokenizers.Metaspace()),
    "lower": ([normalizers.NFKC(), normalizers.Lowercase()], pre_tokenizers.Metaspace(prepend_scheme="never")),
}
PIECES = "XLMRoberta Camembert DebertaV2 Albert T5 BigBird RemBert"
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


def make_unigram(layout: str) -> Tokenizer:
    steps, splitter = UNIGRAMS[layout]
    if layout == "precompiled":
        spec = NormalizerSpec.FromString(SentencePieceNormalizer(rule_name="nmt_nfkc").serialized_normalizer_spec())
        steps = [normalizers.Precompiled(spec.precompiled_charsmap), *steps]
    scores = dict.fromkeys(ROBERTA, 0.0) | {"\u2581": -3.0, "\u2581a": -2.0, "\u2581The": -2.0}
    scores |= {letter: -5 - i / 1000 for i, letter in enumerate(LETTERS)}
    tokenizer = Tokenizer(models.Unigram(list(scores.items()), unk_id=1))
    if steps:
        tokenizer.normalizer = normalizers.Sequence(steps)
    tokenizer.pre_tokenizer = splitter
    tokenizer.decoder = decoders.Metaspace()
    tokenizer.add_special_tokens(list(ROBERTA))
    tokenizer.post_processor = processors.RobertaProcessing(("</s>", 3), ("<s>", 2), False, False)
    return tokenizer


def write(folder: Path, tokenizer: Tokenizer, names: tuple[str, ...], **settings: object) -> Path:
    folder.mkdir(parents=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    roles = {f"{role}_token": name for role, name in zip(ROLES, names, strict=True)}
    (folder / "tokenizer_config.json").write_text(json.dumps(roles | settings))
    return folder


def assert_same_ids(folder: Path) -> None:
    """The tokenizer that encodes a corpus, and the one in an import, give transformers' ids."""
    wanted = load_auto_tokenizer(folder)(LINES)["input_ids"]
    ours = read_hf_tokenizer(folder)
    assert [encoding.ids for encoding in ours.encode_batch(LINES)] == wanted
    out = folder.with_name(f"{folder.name}-out")
    out.mkdir()
    copy_tokenizer(folder, out, 512)
    assert load_auto_tokenizer(out)(LINES)["input_ids"] == wanted
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


def around(names: tuple[str, ...], ids: dict[str, int]) -> list[processors.PostProcessor | None]:
    """What may stand around a text in a tokenizer.json: nothing, one token, or the class's tokens in another order."""
    cls, sep = names[2:4]
    tokens = [(cls, ids[cls]), (sep, ids[sep])]
    return [
        None,
        processors.TemplateProcessing(single=f"{cls} $A", pair=f"{cls} $A $B:1", special_tokens=tokens),
        processors.TemplateProcessing(single=f"{sep} $A {cls}", pair=f"{sep} $A $B {cls}:1", special_tokens=tokens),
    ]


@pytest.mark.parametrize(
    ("name", "number"),
    cases(
        [("Bert", 0), ("Bert", 1), ("Roberta", 2), ("MPNet", 2)],
        product([*WORDPIECE.split(), *BYTES.split()], range(3)),
    ),
)
def test_a_class_puts_its_own_tokens_around_a_text_whatever_its_file_says(name, number, tmp_path):
    names = ROBERTA if name in BYTES.split() else NAMES.get(name, BERT)
    tokenizer = make_bytes(False) if name in BYTES.split() else make_wordpiece(names, STATES[0])
    tokenizer.post_processor = around(names, tokenizer.get_vocab())[number]
    folder = write(tmp_path / "in", tokenizer, names, tokenizer_class=f"{name}Tokenizer")
    assert_same_ids(folder)
    theirs = load_auto_tokenizer(folder)("the", "e", return_token_type_ids=True)
    ours = read_hf_tokenizer(folder).encode("the", "e")
    assert (ours.ids, ours.type_ids) == (theirs["input_ids"], theirs["token_type_ids"])


@pytest.mark.parametrize(("name", "model"), [("Bert", "BPE"), ("Llama", "Unigram")])
def test_a_class_that_splits_by_another_model_is_refused_and_the_advice_works(name, model, tmp_path):
    """transformers 5 would read the vocabulary with the class's own model."""
    tokenizer = make_bytes(False) if model == "BPE" else make_unigram("cased")
    folder = write(tmp_path / "in", tokenizer, ROBERTA, tokenizer_class=f"{name}Tokenizer")
    message = rf"tokenizer.json: splits by {model}, but its class {name}Tokenizer by \w+, .* set tokenizer_class to"
    with pytest.raises(ValueError, match=message):
        read_hf_tokenizer(folder)
    path = folder / "tokenizer_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"tokenizer_class": "PreTrainedTokenizerFast"}))
    assert_same_ids(folder)


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("funnel", "the vocabulary lacks <unk>, the unknown token of FunnelTokenizer"),
        ("big_bird", "transformers cannot load it: cannot access local variable"),
    ],
)
def test_a_class_that_the_file_does_not_fit_is_refused_and_the_advice_works(kind, message, tmp_path):
    folder = write(tmp_path / "in", make_wordpiece(BERT, STATES[1]), BERT)
    (folder / "config.json").write_text(json.dumps({"model_type": kind}))
    path = folder / "tokenizer_config.json"
    path.write_text("{}")
    with pytest.raises(ValueError, match=rf"tokenizer.json: its class is \w+, but {message}"):
        read_hf_tokenizer(folder)
    path.write_text(json.dumps({"tokenizer_class": "PreTrainedTokenizerFast"}))
    assert_same_ids(folder)


@pytest.mark.parametrize(
    ("name", "fast"),
    cases([("XLMRoberta", ""), ("Camembert", "Fast"), ("T5", "")], product(PIECES.split(), ("", "Fast"))),
)
def test_a_class_of_pieces_gives_its_ids_whatever_its_files_say(name, fast, tmp_path):
    for layout in UNIGRAMS:
        assert_same_ids(
            write(tmp_path / layout, make_unigram(layout), ROBERTA, tokenizer_class=f"{name}Tokenizer{fast}")
        )


# By model_type, what its tokenizer splits with. transformers does not know the last.
KINDS = dict.fromkeys(("bert", "distilbert", "electra", "convbert", "layoutlm", "nomic_bert"), "wordpiece")
KINDS |= dict.fromkeys(("roberta", "longformer", "bart"), "bytes")
KINDS |= dict.fromkeys(("xlm-roberta", "camembert", "gte", "xlm-roberta-xl"), "unigram") | {"new": "wordpiece"}


@pytest.mark.parametrize("kind", KINDS)
def test_a_tokenizer_that_names_no_class_has_that_of_the_model_beside_it(kind, tmp_path):
    splits = {"unigram": make_unigram("lower"), "bytes": make_bytes(True), "wordpiece": make_wordpiece(BERT, STATES[1])}
    folder = write(tmp_path / "in", splits[KINDS[kind]], BERT if KINDS[kind] == "wordpiece" else ROBERTA)
    (folder / "config.json").write_text(json.dumps({"model_type": kind}))
    assert_same_ids(folder)


def test_the_config_of_a_model_may_name_the_class(tmp_path):
    folder = write(tmp_path / "in", make_unigram("lower"), ROBERTA)
    (folder / "config.json").write_text(json.dumps({"model_type": "bert", "tokenizer_class": "XLMRobertaTokenizer"}))
    assert_same_ids(folder)


def test_a_modernbert_takes_tokenizer_json_as_it_is_whatever_class_is_named(tmp_path):
    folder = write(tmp_path / "in", make_wordpiece(BERT, STATES[1]), BERT, tokenizer_class="BertTokenizer")
    (folder / "config.json").write_text(json.dumps({"model_type": "modernbert"}))
    assert_same_ids(folder)


@pytest.mark.parametrize("file", ["tokenizer.json", "vocab.txt"])
def test_a_class_that_is_no_text_is_refused(tmp_path, file):
    folder = write(tmp_path / "in", make_wordpiece(BERT, STATES[1]), BERT, tokenizer_class=["BertTokenizer"])
    if file == "vocab.txt":
        (folder / "tokenizer.json").unlink()
        (folder / "vocab.txt").write_text("\n".join([*BERT, "the"]))
    with pytest.raises(ValueError, match=r"tokenizer_config.json: tokenizer_class is a list, expected a text\."):
        read_hf_tokenizer(folder)


def test_a_class_that_reads_no_tokenizer_json_is_refused_and_the_advice_works(tmp_path):
    folder = write(tmp_path / "in", make_bytes(False), ROBERTA, tokenizer_class="BertweetTokenizer")
    with pytest.raises(ValueError, match=r"tokenizer.json: its class is BertweetTokenizer, but .* set tokenizer_class"):
        read_hf_tokenizer(folder)
    path = folder / "tokenizer_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"tokenizer_class": "PreTrainedTokenizerFast"}))
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
    theirs = load_auto_tokenizer(tmp_path)("the thes")["input_ids"]
    assert Tokenizer.from_file(str(tmp_path / "out/tokenizer.json")).encode("the thes").ids == theirs
