"""A sentencepiece model as a fast tokenizer that gives the same ids, with BERT's special tokens; and the proof.

What cannot be the same is said in README.md, and counted by `differing_lines` on text of the corpus itself.
"""

import re
from collections.abc import Iterable
from typing import Any, NamedTuple

import sentencepiece
from sentencepiece import sentencepiece_model_pb2
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers

from megabert.data.shards.sample_format import SPECIAL_TOKENS
from megabert.data.shards.tokenizer import encode

META = "\u2581"  # sentencepiece's mark for a space

# The types of a piece, as sentencepiece_model.proto numbers them.
NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = range(1, 7)

# The score of pieces that no text may become: below that of any other way to cut up a document of 64 MB.
UNREACHABLE_SCORE = -1e12


class Piece(NamedTuple):
    text: str
    score: float
    type: int


def to_fast_tokenizer(sentencepiece_model: bytes, where: str = "the model") -> Tokenizer:
    """Rebuild a sentencepiece model. Raises ValueError for what is not a unigram or BPE model."""
    proto = parse(sentencepiece_model, where)
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
    if steps:
        tokenizer.normalizer = normalizers.Sequence(steps)
    scheme = "always" if spec.add_dummy_prefix else "never"
    splits: list[Any] = [pre_tokenizers.Metaspace(replacement=META, prepend_scheme=scheme)] if by_words else []
    if symbols and not is_unigram:
        # Alone, a symbol is found whole; longest first, as sentencepiece looks for them.
        pattern = "|".join(sorted(symbols, key=len, reverse=True))
        splits.append(pre_tokenizers.Split(Regex(pattern), "isolated"))
    if splits:
        tokenizer.pre_tokenizer = pre_tokenizers.Sequence(splits)
    tokenizer.decoder = decoders.Sequence(
        [decoders.ByteFallback(), decoders.Metaspace(replacement=META, prepend_scheme=scheme)]
    )
    tokenizer.add_special_tokens([piece.text for piece in pieces if piece.type in (CONTROL, UNKNOWN)])
    return tokenizer


def parse(sentencepiece_model: bytes, where: str) -> Any:
    """The model's parts. Raises ValueError if it is none, or is of a type that has no fast tokenizer."""
    try:
        sentencepiece.SentencePieceProcessor().LoadFromSerializedProto(sentencepiece_model)
    except RuntimeError as error:
        raise ValueError(f"{where}: not a sentencepiece model: {' '.join(str(error).split())}") from error
    proto = sentencepiece_model_pb2.ModelProto.FromString(sentencepiece_model)  # pyrefly: ignore[missing-attribute]
    kind = proto.trainer_spec.model_type
    if kind not in (proto.trainer_spec.UNIGRAM, proto.trainer_spec.BPE):
        name = {proto.trainer_spec.WORD: "word", proto.trainer_spec.CHAR: "char"}.get(kind, kind)
        raise ValueError(f"{where}: a {name} model, expected unigram or bpe. Train one with --model unigram.")
    return proto


def _rename_special_pieces(proto: Any) -> list[Piece]:
    """The pieces; those that do for [PAD], [UNK], [CLS] and [SEP] what BERT's do are called so, [MASK] by its name.

    A control piece's text is no more than its name: sentencepiece never finds it in a text.
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
    """Only ordinary pieces and the user's own may be found in a text; the latter always win, as in sentencepiece.

    Its score for them: https://github.com/google/sentencepiece, src/unigram_model.cc, Model::EncodeOptimized.
    """
    best = max((piece.score for piece in pieces if piece.type == NORMAL), default=0.0)

    def score(piece: Piece) -> float:
        if piece.type == USER_DEFINED:
            return len(piece.text.encode()) * best - 0.1
        return piece.score if piece.type == NORMAL else UNREACHABLE_SCORE

    unknown = next(number for number, piece in enumerate(pieces) if piece.type == UNKNOWN)
    return models.Unigram([(piece.text, score(piece)) for piece in pieces], unk_id=unknown, byte_fallback=byte_fallback)


def _bpe(pieces: list[Piece], byte_fallback: bool) -> models.BPE:
    """A merge for each ordinary piece from every pair of pieces that it can be made of, best first."""
    ids = {piece.text: number for number, piece in enumerate(pieces)}
    ordinary = {piece.text for piece in pieces if piece.type == NORMAL}
    merges = []
    for text, score, kind in pieces:
        halves = ((text[:cut], text[cut:]) for cut in range(1, len(text))) if kind == NORMAL else ()
        merges += [(-score, ids[a], ids[b], a, b) for a, b in halves if a in ordinary and b in ordinary]
    pairs = [(a, b) for *_, a, b in sorted(merges)]
    unknown = next(piece.text for piece in pieces if piece.type == UNKNOWN)
    symbols = any(piece.type == USER_DEFINED for piece in pieces)  # are in no merge: they are found whole
    return models.BPE(ids, pairs, unk_token=unknown, fuse_unk=True, byte_fallback=byte_fallback, ignore_merges=symbols)


def _no_piece_spans_a_space(pieces: list[Piece]) -> bool:
    """Whether no piece spans a space, so that words can be cut up one by one, which is faster."""
    texts = [piece.text for piece in pieces if piece.type in (NORMAL, USER_DEFINED)]
    return META in texts and not any(META in text[1:] for text in texts)


def _normalizer(proto: Any, by_words: bool) -> list[Any]:
    """What sentencepiece's normalizer does, in its order. Metaspace marks the spaces where words are cut up one by one."""
    spec, suffix = proto.normalizer_spec, proto.trainer_spec.treat_whitespace_as_suffix
    steps: list[Any] = []
    if spec.precompiled_charsmap:
        by_rule = normalizers.Precompiled(spec.precompiled_charsmap)
        if not spec.remove_extra_whitespaces and by_rule.normalize_str("\r") == by_rule.normalize_str("\n"):
            steps.append(normalizers.Replace("\r\n", "\n\n"))  # else one space: it takes the pair for one character
        steps.append(by_rule)
    if spec.remove_extra_whitespaces:
        # Spaces only, not all that is white; at the end also a mark that the text itself had.
        for pattern, content in (("  +", " "), (r"\A +", ""), (rf"[ {META}]+\z", "")):
            steps.append(normalizers.Replace(Regex(pattern), content))
    if by_words and spec.add_dummy_prefix:
        # Metaspace adds no mark where the text itself begins with one, or with a space that becomes one.
        steps.append(normalizers.Replace(Regex(rf"\A(?=[ {META}])"), META))
    elif not by_words:
        if spec.escape_whitespaces:
            steps.append(normalizers.Replace(" ", META))
        if spec.add_dummy_prefix:
            mark = META if spec.escape_whitespaces else " "
            steps.append(normalizers.Replace(Regex(r"(?<=[\s\S])\z"), mark) if suffix else normalizers.Prepend(mark))
    return steps


def differing_lines(tokenizer: Tokenizer, sentencepiece_model: bytes, lines: Iterable[str]) -> list[str]:
    """The lines to which the two give different ids."""
    processor = sentencepiece.SentencePieceProcessor()
    processor.LoadFromSerializedProto(sentencepiece_model)
    every = list(lines)
    ours = encode(tokenizer, every)
    return [line for line, ids, theirs in zip(every, ours, processor.encode(every), strict=True) if ids != theirs]


def user_defined_symbols(sentencepiece_model: bytes) -> list[str]:
    """The texts that its maker wanted to be one piece each."""
    return [piece.piece for piece in parse(sentencepiece_model, "the model").pieces if piece.type == USER_DEFINED]
