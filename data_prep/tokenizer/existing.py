"""Load an existing tokenizer: BERT's vocab.txt, a sentencepiece model, tokenizer.json, or a Hugging Face folder."""

import json
from pathlib import Path
from typing import Any, NamedTuple

from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers

from data_prep.tokenizer.from_sentencepiece import to_fast_tokenizer
from megabert.data.shards.manifest import TOKENIZER
from megabert.data.shards.sample_format import SPECIAL_TOKENS
from megabert.data.shards.tokenizer import TOKENIZER_CONFIG, read_tokenizer

VOCAB = "vocab.txt"
MAX_WORD_CHARS = 100  # as in BERT: a longer word is [UNK]


class LoadedTokenizer(NamedTuple):
    """sentencepiece_model: the model file that the tokenizer was converted from, or None."""

    tokenizer: Tokenizer
    sentencepiece_model: bytes | None = None


def load_tokenizer(path: Path, lowercase: bool) -> LoadedTokenizer:
    """Load a tokenizer. Raises ValueError if it cannot be read.

    lowercase: whether to fold case if it is a vocab.txt, which does not record this.
    """
    if path.is_dir():
        return _load_folder(path, lowercase)
    if not path.is_file():
        raise ValueError(
            f"{path}: no such tokenizer; expected a {VOCAB}, a sentencepiece .model, a {TOKENIZER}, or a folder with "
            "one of them."
        )
    if path.suffix == ".txt":
        return LoadedTokenizer(_from_vocab(path, bert_normalizer(lowercase)))
    if path.suffix == ".json":
        return LoadedTokenizer(read_tokenizer(path))
    model = path.read_bytes()
    return LoadedTokenizer(to_fast_tokenizer(model, str(path)), model)


def _load_folder(folder: Path, lowercase: bool) -> LoadedTokenizer:
    if (folder / TOKENIZER).is_file():
        return LoadedTokenizer(read_tokenizer(folder / TOKENIZER))
    if (folder / VOCAB).is_file():
        return LoadedTokenizer(_from_vocab(folder / VOCAB, _normalizer_from_config(folder, lowercase)))
    if sentencepiece_models := sorted(folder.glob("*.model")):
        return load_tokenizer(sentencepiece_models[0], lowercase)
    # Other files, such as vocab.json with merges.txt, are left to transformers.
    from transformers import AutoTokenizer

    try:
        loaded: Any = AutoTokenizer.from_pretrained(str(folder), local_files_only=True)
        backend = loaded.backend_tokenizer
    except (OSError, ValueError, KeyError, AttributeError) as error:
        raise ValueError(
            f"{folder}: holds neither {TOKENIZER}, {VOCAB} nor a .model, and transformers cannot load it: {error}"
        ) from error
    return LoadedTokenizer(Tokenizer.from_str(backend.to_str()))


def bert_normalizer(lowercase: bool) -> normalizers.BertNormalizer:
    """Return BERT's normalizer: no control characters, Chinese characters apart, and if uncased, no accents."""
    return normalizers.BertNormalizer(
        clean_text=True, handle_chinese_chars=True, strip_accents=None, lowercase=lowercase
    )


def use_bert_components(tokenizer: Tokenizer, lowercase: bool) -> Tokenizer:
    """Give a WordPiece tokenizer BERT's normalizer, pre-tokenizer and decoder. Returns it."""
    tokenizer.normalizer = bert_normalizer(lowercase)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece(prefix="##")
    return tokenizer


def _normalizer_from_config(folder: Path, lowercase: bool) -> normalizers.BertNormalizer:
    """Return the normalizer that tokenizer_config.json describes, if the folder has one."""
    path = folder / TOKENIZER_CONFIG
    try:
        config = json.loads(path.read_bytes()) if path.is_file() else {}
    except ValueError as error:
        raise ValueError(f"{path}: not valid JSON: {error}") from error
    return normalizers.BertNormalizer(
        clean_text=True,
        handle_chinese_chars=config.get("tokenize_chinese_chars", True),
        strip_accents=config.get("strip_accents"),
        lowercase=config.get("do_lower_case", lowercase),
    )


def _from_vocab(path: Path, normalizer: normalizers.BertNormalizer) -> Tokenizer:
    """Read a vocab.txt, which holds one piece per line in the order of the ids.

    Raises ValueError if it is malformed, or cased while the normalizer folds case.
    """
    pieces = path.read_text(encoding="utf-8").split("\n")
    pieces = [piece.rstrip("\r") for piece in (pieces[:-1] if pieces[-1] == "" else pieces)]
    ids = {piece: number for number, piece in enumerate(pieces)}
    if len(ids) < len(pieces):
        duplicate = next(piece for number, piece in enumerate(pieces) if ids[piece] != number)
        raise ValueError(f"{path}: lists {duplicate!r} twice, expected a vocabulary of one piece per line.")
    unknown = SPECIAL_TOKENS["unk"]
    if unknown not in ids:
        raise ValueError(f"{path}: has no {unknown}, expected BERT's vocabulary of one piece per line.")
    special = set(SPECIAL_TOKENS.values())
    upper = [piece for piece in pieces if piece not in special and not piece.startswith("[") and piece != piece.lower()]
    if upper and normalizer.lowercase:
        raise ValueError(
            f"{path}: is cased (it has {upper[0]!r}), but text would be lower-cased. Pass --lowercase false, or if "
            f"--existing is a folder with a {TOKENIZER_CONFIG}, set do_lower_case to false in that file."
        )
    tokenizer = Tokenizer(models.WordPiece(ids, unk_token=unknown, max_input_chars_per_word=MAX_WORD_CHARS))
    tokenizer = use_bert_components(tokenizer, normalizer.lowercase)
    tokenizer.normalizer = normalizer
    return tokenizer
