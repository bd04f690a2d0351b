"""A folder's tokenizer: tokenizer.json, or what older folders have in its place; and what goes into a folder of ours.

Nothing of a stranger's settings is passed on that is not listed here: auto_map and the like name code to run.
"""

import json
import shutil
from pathlib import Path
from typing import Any

import transformers
from tokenizers import AddedToken, Tokenizer
from tokenizers.implementations import BertWordPieceTokenizer

from megabert.convert.hf.reading import inside, read_json
from megabert.data.shards.manifest import TOKENIZER
from megabert.data.shards.sample_format import SPECIAL_TOKENS
from megabert.data.shards.tokenizer import TOKENIZER_CONFIG, read_tokenizer

# Without it in the config, pipelines of transformers < 4.57 load no tokenizer.
TOKENIZER_CLASS = "PreTrainedTokenizerFast"
VOCAB = "vocab.txt"
ADDED = "added_tokens.json"
SPECIAL_MAP = "special_tokens_map.json"

TOKENS = (*(f"{role}_token" for role in SPECIAL_TOKENS), "bos_token", "eos_token", "additional_special_tokens",
          "extra_special_tokens", "added_tokens_decoder")  # fmt: skip
TOKEN_FLAGS = {"single_word", "lstrip", "rstrip", "normalized", "special"}
SETTINGS = ("tokenizer_class", "do_lower_case", "strip_accents", "tokenize_chinese_chars", "clean_up_tokenization_spaces",
            "padding_side", "truncation_side", "model_input_names", *TOKENS)  # fmt: skip


def copy_tokenizer(source: Path, folder: Path, max_length: int) -> None:
    """Write the tokenizer of a folder, or a tokenizer.json by itself, into `folder`, and how long a text may be.

    A folder without a tokenizer gives none. What tokenizer.json says of cutting and padding is left out: the length is ours.
    """
    beside = source if source.is_dir() else source.parent
    if source.is_dir():
        for name in (VOCAB, ADDED, SPECIAL_MAP):
            if (source / name).is_file():
                shutil.copyfile(inside(source, name), folder / name)
    if source.is_file() or (source / TOKENIZER).is_file():
        _copy_without_limits(source if source.is_file() else inside(source, TOKENIZER), folder / TOKENIZER)
    elif (source / VOCAB).is_file():
        (folder / TOKENIZER).write_text(_from_vocab(source).to_str(), encoding="utf-8")
    named = source.is_dir() or source.name == TOKENIZER  # a tokenizer_config.json is of the tokenizer.json beside it
    settings = {name: value for name, value in (_settings(beside) if named else {}).items() if name in SETTINGS}
    if "Token" not in (name := str(settings.get("tokenizer_class"))) or not hasattr(transformers, name):
        settings["tokenizer_class"] = TOKENIZER_CLASS
    if (folder / TOKENIZER).is_file():
        vocabulary = read_tokenizer(folder / TOKENIZER).get_vocab(with_added_tokens=True)
        named_tokens = {f"{role}_token": token for role, token in SPECIAL_TOKENS.items() if token in vocabulary}
        settings = named_tokens | settings
    settings["model_max_length"] = max_length
    (folder / TOKENIZER_CONFIG).write_text(json.dumps(settings, indent=1) + "\n")


def _copy_without_limits(source: Path, copy: Path) -> None:
    raw = read_json(source)
    if raw.get("truncation") is None and raw.get("padding") is None:
        shutil.copyfile(source, copy)
    else:
        copy.write_text(json.dumps(raw | {"truncation": None, "padding": None}, ensure_ascii=False), encoding="utf-8")


def read_tokenizer_of(path: Path) -> Tokenizer:
    """The tokenizer of a folder, or a tokenizer.json itself, cutting and padding nothing. Raises ValueError if there is none."""
    if path.is_dir() and not (path / TOKENIZER).is_file() and (path / VOCAB).is_file():
        tokenizer = _from_vocab(path)
        tokenizer.encode_special_tokens = True  # as read_tokenizer: "[MASK]" in a text is text
        return tokenizer
    return read_tokenizer(inside(path, TOKENIZER) if path.is_dir() else path)


def _settings(folder: Path) -> dict[str, Any]:
    """tokenizer_config.json, or nothing."""
    return read_json(inside(folder, TOKENIZER_CONFIG)) if (folder / TOKENIZER_CONFIG).is_file() else {}


def _from_vocab(folder: Path) -> Tokenizer:
    """BERT's tokenizer from its vocab.txt and the files beside it, as transformers' BertTokenizerFast reads them."""
    path = inside(folder, VOCAB)
    settings = _settings(folder)
    if "added_tokens_decoder" not in settings and (folder / SPECIAL_MAP).is_file():
        settings |= read_json(inside(folder, SPECIAL_MAP))
    try:
        pieces = path.read_text(encoding="utf-8").removesuffix("\n").split("\n")  # U+2028 and U+0085 are in pieces
    except UnicodeDecodeError as mistake:
        raise ValueError(f"{path}: is not UTF-8: {mistake}") from mistake
    vocabulary = {piece: number for number, piece in enumerate(pieces)}
    special: Any = {
        f"{role}_token": _token(folder, settings.get(f"{role}_token") or token)
        for role, token in SPECIAL_TOKENS.items()
    }
    needed = [special[f"{role}_token"].content for role in ("cls", "sep", "unk")]
    if lacking := [token for token in needed if token not in vocabulary]:
        raise ValueError(f"{path}: has no {' and no '.join(lacking)}; expected a BERT vocabulary, a piece per line.")
    bert: Any = BertWordPieceTokenizer(
        vocabulary,
        handle_chinese_chars=_flag(folder, settings, "tokenize_chinese_chars", True),
        strip_accents=_flag(folder, settings, "strip_accents", None),
        lowercase=_flag(folder, settings, "do_lower_case", True),
        **special,
    )
    tokenizer: Tokenizer = bert._tokenizer
    for number, token in _added_tokens(folder, settings):
        (tokenizer.add_special_tokens if token.special else tokenizer.add_tokens)([token])
        if number is not None and (got := tokenizer.token_to_id(token.content)) != number:
            raise ValueError(
                f"{folder}: its added token {token.content!r} has the id {number}, but {VOCAB} makes it {got}."
            )
    return tokenizer


def _added_tokens(folder: Path, settings: dict[str, Any]) -> list[tuple[int | None, AddedToken]]:
    """What is added to vocab.txt, by id, and then what only is to be left whole."""
    extra = settings.get("additional_special_tokens") or settings.get("extra_special_tokens") or []
    if not isinstance(extra, list):
        raise ValueError(f"{folder}: its additional_special_tokens are a {type(extra).__name__}, expected a list.")
    whole = [_token(folder, token) for token in extra]
    listed = settings.get("added_tokens_decoder")
    if listed is None:
        legacy = read_json(inside(folder, ADDED)) if (folder / ADDED).is_file() else {}
        names = {token.content for token in whole} | set(SPECIAL_TOKENS.values())
        listed = {
            str(number): {"content": content, "special": content in names, "normalized": content not in names}
            for content, number in legacy.items()
        }
    if not isinstance(listed, dict) or not all(str(number).isdecimal() for number in listed):
        raise ValueError(f"{folder}: its added_tokens_decoder or {ADDED} is not a list of tokens with their numbers.")
    added = [(int(number), _token(folder, token)) for number, token in listed.items()]
    return [*sorted(added, key=lambda item: item[0]), *((None, token) for token in whole)]


def _token(folder: Path, value: Any) -> AddedToken:
    """A token written as its text, which is then a special one, or as an object."""
    fields = {"content": value, "normalized": False} if isinstance(value, str) else value
    if isinstance(fields, dict):
        flags = {"special": True} | {name: flag for name, flag in fields.items() if name not in ("content", "__type")}
        content = fields.get("content")
        if (
            isinstance(content, str)
            and flags.keys() <= TOKEN_FLAGS
            and all(flag in (True, False) for flag in flags.values())
        ):
            return AddedToken(content, **flags)
    raise ValueError(
        f"{folder}: {value!r} is not a token of a tokenizer, expected its text or an object with its content."
    )


def _flag(folder: Path, settings: dict[str, Any], name: str, default: bool | None) -> Any:
    value = settings.get(name, default)
    if not isinstance(value, bool) and value is not None:
        raise ValueError(f"{folder / TOKENIZER_CONFIG}: {name} is {value!r}, expected true or false.")
    return default if value is None else value
