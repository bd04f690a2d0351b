"""Convert a sentencepiece model to a fast tokenizer with the same ids and BERT's special tokens.

data_prep/README.md lists the texts that get other ids; `differing_lines` finds them in a corpus.
"""

import re
from collections.abc import Iterable
from typing import Any, NamedTuple

import sentencepiece
from sentencepiece import sentencepiece_model_pb2
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers

from data_prep.tokenizer.normalizer import normalize_by_rules
from megabert.data.shards.sample_format import SPECIAL_TOKENS
from megabert.data.shards.tokenizer import encode
from megabert.process.error_text import one_line

# The character that stands for a space in sentencepiece.
META = "\u2581"

# The types of pieces, numbered as in sentencepiece_model.proto.
NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = range(1, 7)

# The score of pieces that must not occur in the encoding of a text. It is lower than the score of any other
# segmentation of a 64 MB document.
UNREACHABLE_SCORE = -1e12

# Unicode reserves this character, so no text and no piece contains it.
UNKNOWN_CHARACTER = "\ufff1"


class Piece(NamedTuple):
    text: str
    score: float
    type: int


def to_fast_tokenizer(sentencepiece_model: bytes, where: str = "the model") -> Tokenizer:
    """Convert a sentencepiece model. Raises ValueError if it is not a unigram or BPE model."""
    proto = parse_model(sentencepiece_model, where)
    pieces = _rename_special_pieces(proto)
    spec = proto.normalizer_spec
    is_unigram = proto.trainer_spec.model_type == proto.trainer_spec.UNIGRAM
    if is_unigram:
        tokenizer = Tokenizer(_unigram(pieces, proto.trainer_spec.byte_fallback))
    else:
        tokenizer = Tokenizer(_bpe(pieces, proto.trainer_spec.byte_fallback))
    symbols = [re.escape(piece.text) for piece in pieces if piece.type == USER_DEFINED]
    by_words = (
        spec.escape_whitespaces
        and not proto.trainer_spec.treat_whitespace_as_suffix
        and _no_piece_spans_a_space(pieces)
    )
    steps = _normalizer(proto, by_words)
    if is_unigram and not proto.trainer_spec.byte_fallback:
        steps += _keep_names_as_text(pieces)
    if steps:
        tokenizer.normalizer = normalizers.Sequence(steps)
    scheme = "always" if spec.add_dummy_prefix else "never"
    splits: list[Any] = [pre_tokenizers.Metaspace(replacement=META, prepend_scheme=scheme)] if by_words else []
    if symbols and not is_unigram:
        # BPE finds a symbol whole only if it stands alone. sentencepiece looks for the longest symbol first.
        pattern = "|".join(sorted(symbols, key=len, reverse=True))
        splits.append(pre_tokenizers.Split(Regex(pattern), "isolated"))
    if splits:
        tokenizer.pre_tokenizer = pre_tokenizers.Sequence(splits)
    tokenizer.decoder = decoders.Sequence(
        [decoders.ByteFallback(), decoders.Metaspace(replacement=META, prepend_scheme=scheme)]
    )
    tokenizer.add_special_tokens([piece.text for piece in pieces if piece.type in (CONTROL, UNKNOWN)])
    return tokenizer


def parse_model(sentencepiece_model: bytes, where: str) -> Any:
    """Parse the ModelProto. Raises ValueError if it is malformed, or a type of model without a fast tokenizer."""
    try:
        sentencepiece.SentencePieceProcessor().LoadFromSerializedProto(sentencepiece_model)
    except RuntimeError as error:
        raise ValueError(f"{where}: not a sentencepiece model: {one_line(error)}") from error
    proto = sentencepiece_model_pb2.ModelProto.FromString(sentencepiece_model)  # pyrefly: ignore[missing-attribute]
    kind = proto.trainer_spec.model_type
    if kind not in (proto.trainer_spec.UNIGRAM, proto.trainer_spec.BPE):
        name = {proto.trainer_spec.WORD: "word", proto.trainer_spec.CHAR: "char"}.get(kind, kind)
        raise ValueError(f"{where}: a {name} model, expected unigram or bpe. Train one with --model unigram.")
    return proto


def _rename_special_pieces(proto: Any) -> list[Piece]:
    """Return the pieces. Those with the roles of [PAD], [UNK], [CLS] and [SEP] get these names; <mask> becomes [MASK].

    The text of a control piece is only a name: sentencepiece never finds it in a text.
    """
    pieces = [Piece(piece.piece, piece.score, piece.type) for piece in proto.pieces]
    ids = {piece.text: number for number, piece in enumerate(pieces)}
    spec = proto.trainer_spec
    unknown = next(piece.text for piece in pieces if piece.type == UNKNOWN)
    roles = {"pad": spec.pad_piece, "unk": unknown, "cls": spec.bos_piece, "sep": spec.eos_piece, "mask": "<mask>"}
    for name, token in SPECIAL_TOKENS.items():
        number = ids.get(roles[name])
        if token not in ids and number is not None and pieces[number].type in (CONTROL, UNKNOWN):
            pieces[number] = pieces[number]._replace(text=token)
    return pieces


def _unigram(pieces: list[Piece], byte_fallback: bool) -> models.Unigram:
    """Build the unigram model. Only normal and user-defined pieces occur in a text, and user-defined ones always win.

    Their score is that of sentencepiece: https://github.com/google/sentencepiece, src/unigram_model.cc,
    Model::EncodeOptimized.
    """
    best = max((piece.score for piece in pieces if piece.type == NORMAL), default=0.0)

    def score(piece: Piece) -> float:
        if piece.type == USER_DEFINED:
            return len(piece.text.encode()) * best - 0.1
        return piece.score if piece.type == NORMAL else UNREACHABLE_SCORE

    unknown = next(number for number, piece in enumerate(pieces) if piece.type == UNKNOWN)
    return models.Unigram([(piece.text, score(piece)) for piece in pieces], unk_id=unknown, byte_fallback=byte_fallback)


def _bpe(pieces: list[Piece], byte_fallback: bool) -> models.BPE:
    """Build the BPE model: every pair of normal pieces that form a normal piece is a merge, best score first."""
    ids = {piece.text: number for number, piece in enumerate(pieces)}
    normal = {piece.text for piece in pieces if piece.type == NORMAL}
    merges = []
    for text, score, kind in pieces:
        halves = ((text[:cut], text[cut:]) for cut in range(1, len(text))) if kind == NORMAL else ()
        merges += [(-score, ids[a], ids[b], a, b) for a, b in halves if a in normal and b in normal]
    pairs = [(a, b) for *_, a, b in sorted(merges)]
    unknown = next(piece.text for piece in pieces if piece.type == UNKNOWN)
    # User-defined symbols are in no merge, so words that are pieces have to be taken whole.
    symbols = any(piece.type == USER_DEFINED for piece in pieces)
    return models.BPE(ids, pairs, unk_token=unknown, fuse_unk=True, byte_fallback=byte_fallback, ignore_merges=symbols)


def _no_piece_spans_a_space(pieces: list[Piece]) -> bool:
    """Return whether no piece spans a space. Then words can be segmented one by one, which is faster."""
    texts = [piece.text for piece in pieces if piece.type in (NORMAL, USER_DEFINED)]
    return META in texts and not any(META in text[1:] for text in texts)


def _normalizer(proto: Any, by_words: bool) -> list[Any]:
    """Return the steps of sentencepiece's normalizer, in its order.

    by_words: whether words are segmented one by one, in which case Metaspace replaces the spaces.
    """
    spec, suffix = proto.normalizer_spec, proto.trainer_spec.treat_whitespace_as_suffix
    steps: list[Any] = []
    if spec.precompiled_charsmap:
        symbols = [piece.piece for piece in proto.pieces if piece.type == USER_DEFINED]
        alphabet = None if proto.trainer_spec.byte_fallback else set("".join(piece.piece for piece in proto.pieces))
        steps += normalize_by_rules(spec.precompiled_charsmap, symbols, alphabet)
    if spec.remove_extra_whitespaces:
        # These are spaces, no other white space; at the end also a META that the text itself contains.
        for pattern, content in (("  +", " "), (rf"\A +|(?: |{META})+\z", "")):
            steps.append(normalizers.Replace(Regex(pattern), content))
    if by_words and spec.add_dummy_prefix:
        # Metaspace adds no META to a text that begins with META or with a space.
        steps.append(normalizers.Replace(Regex(rf"\A(?=[ {META}])"), META))
    elif not by_words:
        if spec.escape_whitespaces:
            steps.append(normalizers.Replace(" ", META))
        if spec.add_dummy_prefix:
            mark = META if spec.escape_whitespaces else " "
            steps.append(normalizers.Replace(Regex(r"(?<=[\s\S])\z"), mark) if suffix else normalizers.Prepend(mark))
    return steps


def _keep_names_as_text(pieces: list[Piece]) -> list[Any]:
    """Return the steps that hide the names of special pieces in a text from the unigram model.

    Although their score is low, the model prefers them to unknown characters. So one unknown character of such a name
    becomes another unknown character.
    """
    known = set("".join(piece.text for piece in pieces if piece.type in (NORMAL, USER_DEFINED)))
    names = [piece.text for piece in pieces if piece.type not in (NORMAL, USER_DEFINED)]
    unknown = {name: next((c for c in name if c not in known), "") for name in names}
    return [normalizers.Replace(name, name.replace(c, UNKNOWN_CHARACTER, 1)) for name, c in unknown.items() if c]


def differing_lines(tokenizer: Tokenizer, sentencepiece_model: bytes, lines: Iterable[str]) -> list[str]:
    """Return the lines that the tokenizer and the sentencepiece model encode to different ids."""
    processor = sentencepiece.SentencePieceProcessor()
    processor.LoadFromSerializedProto(sentencepiece_model)
    lines = list(lines)
    pairs = zip(lines, encode(tokenizer, lines), processor.encode(lines), strict=True)
    return [line for line, ids, expected in pairs if ids != expected]


def user_defined_symbols(sentencepiece_model: bytes) -> list[str]:
    """Return the texts that were declared to be one piece each when the model was trained."""
    return [piece.piece for piece in parse_model(sentencepiece_model, "the model").pieces if piece.type == USER_DEFINED]
