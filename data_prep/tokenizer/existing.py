"""Load an existing tokenizer: BERT's vocab.txt, a sentencepiece model, tokenizer.json, or a Hugging Face folder."""

from pathlib import Path
from typing import NamedTuple

from tokenizers import Tokenizer, decoders, normalizers, pre_tokenizers

from data_prep.tokenizer.from_sentencepiece import to_fast_tokenizer
from megabert.data.shards.manifest import TOKENIZER, TOKENIZER_CONFIG
from megabert.data.shards.sample_format import SPECIAL_TOKENS
from megabert.data.shards.tokenizer import read_tokenizer
from megabert.data.shards.tokenizer_folder import (
    FILES,
    INSTEAD,
    VOCAB,
    is_berts,
    load_with_transformers,
    read_folder_tokenizer,
    rename_special_tokens,
    special_token_names,
)
from megabert.files.bounded_reads import has_file

# A word with more characters becomes [UNK], as in BERT.
MAX_WORD_CHARS = 100
# In a cased vocabulary a third of the pieces have capitals. In an uncased one, names such as <S> may have some.
CASED_SHARE = 0.1
FEWEST_PIECES_TO_JUDGE = 100


class LoadedTokenizer(NamedTuple):
    """sentencepiece_model: the model file that the tokenizer was converted from, or None."""

    tokenizer: Tokenizer
    sentencepiece_model: bytes | None = None


def load_tokenizer(path: Path, lowercase: bool) -> LoadedTokenizer:
    """Load a tokenizer, whose special tokens get BERT's names and keep their ids. Raises ValueError.

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
        return LoadedTokenizer(_from_vocab(path, {VOCAB: path}, lowercase))
    if path.suffix == ".json":
        return LoadedTokenizer(rename_special_tokens(read_tokenizer(path), {}))
    model = path.read_bytes()
    return LoadedTokenizer(to_fast_tokenizer(model, str(path)), model)


def _load_folder(folder: Path, lowercase: bool) -> LoadedTokenizer:
    files = {name: folder / name for name in FILES if has_file(folder / name)}
    if TOKENIZER in files:
        return LoadedTokenizer(rename_special_tokens(read_folder_tokenizer(files), special_token_names(files)))
    if VOCAB in files and is_berts(files):
        return LoadedTokenizer(_from_vocab(files[VOCAB], files, lowercase))
    models = sorted(folder.glob("*.model"))
    if models and not files and not (folder / "config.json").is_file():
        return load_tokenizer(models[0], lowercase)
    return _load_with_transformers(folder, models)


def _load_with_transformers(folder: Path, models: list[Path]) -> LoadedTokenizer:
    """Load what only transformers' own class knows, such as the ids that XLM-RoBERTa gives the pieces of its .model."""
    try:
        loaded = load_with_transformers(folder)
    except ValueError as error:
        remedy = f" For the ids of the sentencepiece model alone, pass --existing {models[0]}." if models else ""
        raise ValueError(
            f"{folder}: holds neither {TOKENIZER} nor a {VOCAB} of BERT's, and {error}.{remedy}"
        ) from error
    tokenizer = Tokenizer.from_str(loaded.backend_tokenizer.to_str())
    special = {token.content for token in tokenizer.get_added_tokens_decoder().values() if token.special}
    # Where a class finds none of its files, it has its special tokens, and some classes a piece for a space.
    if len(tokenizer.get_vocab(with_added_tokens=True).keys() - special) <= 1:
        raise ValueError(
            f"{folder}: its class, by {TOKENIZER_CONFIG} or config.json, is {type(loaded).__name__}, of whose files it "
            f"has none. Copy all files of the tokenizer into it, or pass --existing the file itself."
        )
    roles = {role: getattr(loaded, f"{role}_token") for role in (*SPECIAL_TOKENS, *INSTEAD.values())}
    return LoadedTokenizer(rename_special_tokens(tokenizer, roles))


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


def _from_vocab(path: Path, files: dict[str, Path], lowercase: bool) -> Tokenizer:
    """Read a vocab.txt, and the other files of its folder. Raises ValueError if its case is not that of the text."""
    tokenizer = read_folder_tokenizer(files, lowercase)
    folds = tokenizer.normalizer.lowercase
    # title() leaves Georgian as it is, which upper() gives capitals that nobody writes.
    pieces = [
        piece for piece in tokenizer.get_vocab() if piece[:1] not in ("[", "<") and piece.lower() != piece.title()
    ]
    upper = [piece for piece in pieces if piece != piece.lower()]
    enough, cased = len(pieces) >= FEWEST_PIECES_TO_JUDGE, len(upper) > CASED_SHARE * len(pieces)
    if folds and enough and cased:
        raise ValueError(
            f"{path}: is cased ({len(upper)} of its {len(pieces)} pieces of letters have capitals, such as "
            f"{min(upper)!r}), but text would be lower-cased. Pass --lowercase false, or if --existing is a folder "
            f"with a {TOKENIZER_CONFIG}, set do_lower_case to false in that file."
        )
    if not folds and enough and not cased and TOKENIZER_CONFIG not in files:
        raise ValueError(
            f"{path}: is uncased ({len(upper)} of its {len(pieces)} pieces of letters have capitals), so words with "
            f"one would be [UNK]. Pass --lowercase true, or if it is cased, put a {TOKENIZER_CONFIG} of "
            '{"do_lower_case": false} beside it and pass the folder.'
        )
    return rename_special_tokens(tokenizer, special_token_names(files))
