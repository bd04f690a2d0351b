"""Read the tokenizer of a Hugging Face folder, tokenizer.json or vocab.txt, and write it into a MegaBERT folder."""

import json
import shutil
from pathlib import Path
from typing import Any

import transformers
from tokenizers import AddedToken, Tokenizer
from tokenizers.implementations import BertWordPieceTokenizer

from megabert.convert.hf.reader import check_inside, read_json
from megabert.data.shards.manifest import TOKENIZER
from megabert.data.shards.sample_format import SPECIAL_TOKENS
from megabert.data.shards.tokenizer import TOKENIZER_CONFIG, read_tokenizer

# Pipelines of transformers before 4.57 load no tokenizer if the config does not name its class.
TOKENIZER_CLASS = "PreTrainedTokenizerFast"
VOCAB = "vocab.txt"
ADDED_TOKENS = "added_tokens.json"
SPECIAL_TOKENS_MAP = "special_tokens_map.json"
FILES = (TOKENIZER, TOKENIZER_CONFIG, VOCAB, ADDED_TOKENS, SPECIAL_TOKENS_MAP)

TOKENS = (*(f"{role}_token" for role in SPECIAL_TOKENS), "bos_token", "eos_token", "additional_special_tokens",
          "extra_special_tokens", "added_tokens_decoder")  # fmt: skip
TOKEN_FLAGS = {"single_word", "lstrip", "rstrip", "normalized", "special"}
# Other settings of tokenizer_config.json, such as auto_map, are not copied, because they may name code to run.
COPIED_SETTINGS = ("tokenizer_class", "do_lower_case", "strip_accents", "tokenize_chinese_chars", "padding_side",
                   "clean_up_tokenization_spaces", "truncation_side", "model_input_names", *TOKENS)  # fmt: skip


def copy_tokenizer(source: Path, folder: Path, max_length: int) -> None:
    """Write a tokenizer and its maximum length into `folder`.

    source: a folder, which may lack a tokenizer, or a tokenizer.json under any name. max_length: in tokens; the
    truncation and padding that tokenizer.json specifies are removed.
    """
    files = find_tokenizer_files(source)
    contents = _read_json_files(files)
    for name in (VOCAB, ADDED_TOKENS, SPECIAL_TOKENS_MAP):
        if name in files:
            shutil.copyfile(files[name], folder / name)
    if TOKENIZER in files:
        _copy_without_limits(files[TOKENIZER], contents[TOKENIZER], folder / TOKENIZER)
    elif VOCAB in files:
        (folder / TOKENIZER).write_text(_from_vocab(files[VOCAB], contents).to_str(), encoding="utf-8")
    settings = {name: value for name, value in contents[TOKENIZER_CONFIG].items() if name in COPIED_SETTINGS}
    if "Token" not in (name := str(settings.get("tokenizer_class"))) or not hasattr(transformers, name):
        settings["tokenizer_class"] = TOKENIZER_CLASS
    if (folder / TOKENIZER).is_file():
        vocabulary = read_tokenizer(folder / TOKENIZER).get_vocab(with_added_tokens=True)
        special = {f"{role}_token": token for role, token in SPECIAL_TOKENS.items() if token in vocabulary}
        settings = special | settings
    settings["model_max_length"] = max_length
    (folder / TOKENIZER_CONFIG).write_text(json.dumps(settings, indent=1) + "\n")


def find_tokenizer_files(source: Path) -> dict[str, Path]:
    """Map the name of each tokenizer file that exists to its path.

    source: a folder, or a tokenizer.json under any name, to which a tokenizer_config.json in its folder belongs only if
    the file is really called tokenizer.json. Raises ValueError if one is a link to a place outside the folder.
    """
    if source.is_dir():
        return {name: check_inside(source, name) for name in FILES if (source / name).is_file()}
    config = source.with_name(TOKENIZER_CONFIG)
    has_config = source.name == TOKENIZER and config.is_file()
    return {TOKENIZER: source} | (
        {TOKENIZER_CONFIG: check_inside(source.parent, TOKENIZER_CONFIG)} if has_config else {}
    )


def read_hf_tokenizer(source: Path) -> Tokenizer:
    """Load the tokenizer of a folder, or a tokenizer.json, without truncation and padding.

    Raises ValueError if there is none or it cannot be read.
    """
    files = find_tokenizer_files(source)
    if TOKENIZER in files:
        return read_tokenizer(files[TOKENIZER])
    if VOCAB not in files:
        return read_tokenizer(check_inside(source, TOKENIZER))  # raises: no such file
    tokenizer = _from_vocab(files[VOCAB], _read_json_files(files))
    tokenizer.encode_special_tokens = True  # as read_tokenizer(): "[MASK]" in a text is text
    return tokenizer


def has_tokenizer(source: Path) -> bool:
    return any((source / name).is_file() for name in (TOKENIZER, VOCAB))


def _read_json_files(files: dict[str, Path]) -> dict[str, dict[str, Any]]:
    """Map the name of each JSON file to its content, which is empty if there is no such file."""
    return {name: read_json(files[name]) if name in files else {} for name in FILES if name != VOCAB}


def _copy_without_limits(source: Path, raw: dict[str, Any], copy: Path) -> None:
    """Copy a tokenizer.json, whose content is raw, without its truncation and padding."""
    if raw.get("truncation") is None and raw.get("padding") is None:
        shutil.copyfile(source, copy)
    else:
        copy.write_text(json.dumps(raw | {"truncation": None, "padding": None}, ensure_ascii=False), encoding="utf-8")


def _from_vocab(vocab: Path, contents: dict[str, dict[str, Any]]) -> Tokenizer:
    """Make BERT's tokenizer from vocab.txt and the JSON files, as transformers' BertTokenizerFast does."""
    folder, settings = vocab.parent, contents[TOKENIZER_CONFIG]
    if "added_tokens_decoder" not in settings:
        settings = settings | contents[SPECIAL_TOKENS_MAP]
    vocabulary = _read_vocab(vocab)
    special: Any = {
        f"{role}_token": _parse_token(folder, settings.get(f"{role}_token") or token)
        for role, token in SPECIAL_TOKENS.items()
    }
    required = [special[f"{role}_token"].content for role in ("cls", "sep", "unk")]
    if missing := [token for token in required if token not in vocabulary]:
        raise ValueError(f"{vocab}: has no {' and no '.join(missing)}; expected a BERT vocabulary, a token per line.")
    bert: Any = BertWordPieceTokenizer(
        vocabulary,
        handle_chinese_chars=_parse_flag(folder, settings, "tokenize_chinese_chars", True),
        strip_accents=_parse_flag(folder, settings, "strip_accents", None),
        lowercase=_parse_flag(folder, settings, "do_lower_case", True),
        **special,
    )
    tokenizer: Tokenizer = bert._tokenizer
    for number, token in _parse_added_tokens(folder, settings, contents[ADDED_TOKENS]):
        (tokenizer.add_special_tokens if token.special else tokenizer.add_tokens)([token])
        if number is not None and (got := tokenizer.token_to_id(token.content)) != number:
            raise ValueError(
                f"{folder}: its added token {token.content!r} has the id {number}, but {VOCAB} makes it {got}."
            )
    return tokenizer


def _read_vocab(path: Path) -> dict[str, int]:
    try:
        # Not splitlines(): U+2028 and U+0085 occur in tokens.
        tokens = path.read_text(encoding="utf-8").removesuffix("\n").split("\n")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: is not UTF-8: {error}") from error
    return {token: number for number, token in enumerate(tokens)}


def _parse_added_tokens(
    folder: Path, settings: dict[str, Any], legacy: dict[str, Any]
) -> list[tuple[int | None, AddedToken]]:
    """List the tokens that are added to vocab.txt: those with an id by id, then those that need none.

    legacy: added_tokens.json, which is used if the settings have no added_tokens_decoder.
    """
    extra = settings.get("additional_special_tokens") or settings.get("extra_special_tokens") or []
    if not isinstance(extra, list):
        raise ValueError(f"{folder}: additional_special_tokens is a {type(extra).__name__}, expected a list.")
    without_id = [_parse_token(folder, token) for token in extra]
    listed = settings.get("added_tokens_decoder")
    if listed is None:
        special = {token.content for token in without_id} | set(SPECIAL_TOKENS.values())
        listed = {
            str(number): {"content": content, "special": content in special, "normalized": content not in special}
            for content, number in legacy.items()
        }
    if not isinstance(listed, dict) or not all(str(number).isdecimal() for number in listed):
        raise ValueError(f"{folder}: added_tokens_decoder or {ADDED_TOKENS} is not an object of tokens with their ids.")
    with_id = [(int(number), _parse_token(folder, token)) for number, token in listed.items()]
    return [*sorted(with_id, key=lambda item: item[0]), *((None, token) for token in without_id)]


def _parse_token(folder: Path, value: Any) -> AddedToken:
    """Parse a token that is written as its text, which makes it a special token, or as an object."""
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
    raise ValueError(f"{folder}: {value!r} is not a token, expected its text or an object with its content.")


def _parse_flag(folder: Path, settings: dict[str, Any], name: str, default: bool | None) -> Any:
    value = settings.get(name, default)
    if not isinstance(value, bool) and value is not None:
        raise ValueError(f"{folder / TOKENIZER_CONFIG}: {name} is {value!r}, expected true or false.")
    return default if value is None else value
