"""Define the options of write_shards.py, and derive from them the input files, the tokenizer and the rule for ids."""

import os
import re
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np

from data_prep.request_file import request_hash
from data_prep.source_options import SourceOptions
from data_prep.sources import DOCSTRINGS, LeftOut, list_input_splits, source_state
from data_prep.sources.base import TOKEN_KINDS, InputSplit
from data_prep.sources.tokens.check import check_tokenizer
from data_prep.sources.tokens.ids import IdRule, make_rule
from data_prep.writing.sorted_runs import WriteSettings
from megabert.config.settings import setting
from megabert.data.shards.manifest import TokenizerInfo
from megabert.data.shards.sample_format import MAX_CHUNK_TOKENS, token_dtype
from megabert.data.shards.tokenizer import TokenizerFile, find_tokenizer, read_tokenizer

Step = Literal["plan", "runs", "merge", "shards", "finish"]
PARALLEL_STEPS = ("runs", "merge", "shards")
TASK = re.compile(r"(\d{1,6})/(\d{1,6})")
NO_EFFECT_ON_SHARDS = (
    "out",
    "workers",
    "replace",
    "trust_tokenizer",
    "max_unknown",
    "step",
    "task",
    "engine",
    "ray_address",
)


@dataclass(frozen=True, kw_only=True)
class Options(SourceOptions):
    out: str = setting("data/quickstart/text", is_output=True)
    """folder to write shards and manifest.json to"""
    tokenizer: str | None = None
    """tokenizer.json, or a folder with one: write token shards; without it, write text shards"""
    min_chars: int = setting(1, "[0, 2^26]")
    """leave out shorter documents, characters"""
    deduplicate: bool = True
    """whether to leave out exact copies of a document"""
    heldout: float = setting(0.0, "[0, 1)")
    """share of the documents to hold out for evaluation, chosen by a hash of their text"""
    min_shards: int = setting(24, "[1, 2^20]")
    """minimum number of training shards; 24 are enough for up to 8 ranks"""
    shard_mb: int = setting(64, "[1, 2^20]")
    """approximate maximum size of a shard, MiB"""
    chunk_tokens: int = setting(MAX_CHUNK_TOKENS, "[1, 131072]")
    """maximum tokens (bytes, for text) of a chunk; a longer document is cut, or if text, gets a chunk of its own"""
    workers: int = setting(os.cpu_count() or 1, "[1, 1024]")
    """processes"""
    seed: int = setting(0, "[0, 2^63)")
    """seed of the order within shards"""
    replace: bool = False
    """whether to replace finished shards in `out` that were made with another source, tokenizer or other settings"""
    document_end: str | None = None
    """of a source of tokens: the token at which documents end, such as [SEP]; by default they end as the files say"""
    trust_tokenizer: bool = False
    """of a source of tokens: accept the tokenizer although it gives few documents the same ids again"""
    max_unknown: float = setting(0.05, "[0, 1]")
    """largest share of [UNK] among the tokens; more ends the command"""
    step: Step | None = None
    """do one part of the work, so that many machines can share it: plan, runs, merge, shards, finish, in this order"""
    task: str = "0/1"
    """with --step: which of the equal parts of the step this command does, such as 3/64; parts are counted from 0"""
    engine: Literal["local", "ray"] = "local"
    """what runs the tasks: the cores of this machine, or a Ray cluster that shares the folders"""
    ray_address: str = "auto"
    """address of the Ray cluster, such as 10.0.0.1:6379; auto: the one that this machine belongs to"""

    def __post_init__(self):
        super().__post_init__()
        numbers = TASK.fullmatch(self.task)
        if not numbers or int(numbers[1]) >= int(numbers[2]):
            raise ValueError(f"task is {self.task!r}, expected i/N with i from 0 to N - 1, such as 0/64 or 63/64.")
        if self.step not in PARALLEL_STEPS and self.task != "0/1":
            raise ValueError(
                f"--task {self.task} needs --step {', '.join(PARALLEL_STEPS[:-1])} or {PARALLEL_STEPS[-1]}."
            )
        if self.step and self.engine == "ray":
            raise ValueError("--step and --engine ray are two ways to use many machines. Omit one of them.")


class ShardRequest(NamedTuple):
    """What a command is asked for.

    ids: which ids a source of tokens may have; request_hash: of everything that determines the bytes of the shards;
    left_out: files of the source.
    """

    options: Options
    splits: list[InputSplit]
    tokenizer_path: Path | None
    tokenizer: TokenizerInfo | None
    ids: IdRule | None
    request_hash: str
    left_out: LeftOut

    @property
    def tokenizer_file(self) -> TokenizerFile | None:
        if self.tokenizer_path is None or self.tokenizer is None:
            return None
        return TokenizerFile(self.tokenizer_path, self.tokenizer.fingerprint)

    @property
    def settings(self) -> WriteSettings:
        o = self.options
        return WriteSettings(
            out=Path(o.out),
            tokenizer=self.tokenizer_file,
            dtype=token_dtype(self.tokenizer.vocab_size) if self.tokenizer else np.dtype(np.uint8),
            read=o.read,
            min_chars=o.min_chars,
            heldout=o.heldout,
            deduplicate=o.deduplicate,
            chunk_tokens=o.chunk_tokens,
            seed=o.seed,
            ids=self.ids,
        )


def resolve_request(options: Options) -> ShardRequest:
    """Read the tokenizer and list the input splits. Raises ValueError if the tokenizer or the source cannot be read."""
    path, tokenizer = find_tokenizer(options.tokenizer) if options.tokenizer else (None, None)
    out = Path(options.out)
    if options.source != DOCSTRINGS and Path(options.source).resolve() == out.resolve():
        # A folder with a manifest is read as shards, so the texts beside it would never be read again.
        raise ValueError(f"{out}: is both --source and --out. Choose another --out.")
    left_out = LeftOut(options.read.skip_damaged)
    splits = list_input_splits(options.source, options.read, left_out)
    ids = rule_of(options, splits, path, tokenizer)
    return ShardRequest(options, splits, path, tokenizer, ids, hash_of(options, tokenizer, splits), left_out)


def hash_of(options: Options, tokenizer: TokenizerInfo | None, splits: list[InputSplit]) -> str:
    """Return the hash of a request, with the source as it is now."""
    asked = what_is_asked(options)
    return request_hash(options=asked, tokenizer=tokenizer and asdict(tokenizer), source=source_state(splits))


def check_unchanged(request: ShardRequest) -> None:
    """Raise ValueError if the source is not the one that was listed: what was read of it may be of two versions."""
    if hash_of(request.options, request.tokenizer, request.splits) != request.request_hash:
        raise ValueError(
            f"{request.options.source}: was changed while it was read. Run the same command again when nothing writes "
            "to it any more; it begins anew."
        )


def what_is_asked(options: Options) -> dict[str, object]:
    """Return the options that determine the shards."""
    return {name: value for name, value in vars(options).items() if name not in NO_EFFECT_ON_SHARDS}


def rule_of(
    options: Options, splits: list[InputSplit], path: Path | None, tokenizer: TokenizerInfo | None
) -> IdRule | None:
    """Return which ids a source of tokens may have, None for text. Raises ValueError if the tokenizer is not theirs."""
    tokens = [split for split in splits if split.kind in TOKEN_KINDS]
    if not tokens:
        if options.document_end is not None:
            raise ValueError(f"{options.source}: --document-end has no effect on text. Omit it.")
        return None
    first, others = tokens[0].paths[0], [split for split in splits if split.kind not in TOKEN_KINDS]
    if others:
        raise ValueError(
            f"{options.source}: holds tokens ({first}) and text ({others[0].paths[0]}). Pass one of them as --source."
        )
    if path is None or tokenizer is None:
        raise ValueError(f"{first}: holds tokens. Pass the tokenizer that they were made with as --tokenizer.")
    if options.min_chars != Options.min_chars:
        raise ValueError(f"{first}: holds tokens, on which --min-chars has no effect. Omit it.")
    end = None if options.document_end is None else read_tokenizer(path).token_to_id(options.document_end)
    if options.document_end is not None and end is None:
        raise ValueError(f"{path}: has no token {options.document_end!r}. Pass one of its tokens as --document-end.")
    rule = make_rule(tokenizer, end)
    print(check_tokenizer(tokens, options.read, rule, path, options.trust_tokenizer))
    return rule
