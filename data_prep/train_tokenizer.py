"""Train a tokenizer on a corpus, or convert an existing one, and write it in the format of transformers.

    {command} --source data/quickstart/text --out data/quickstart/tokenizer
    {command} --existing bert-base-uncased/vocab.txt --out data/bert/tokenizer

The result has BERT's five special tokens. If it comes from sentencepiece, lines of the corpus are encoded with both
tokenizers, and the number of lines with different ids is printed.
"""

import sys

try:
    from megabert.process.interrupts import end_at_ctrl_c
except ModuleNotFoundError as error:
    print(f"{error}: run bash launch/install.sh, then source .venv/bin/activate.", file=sys.stderr)
    sys.exit(2)

if __name__ == "__main__":
    end_at_ctrl_c()

import io
import itertools
import json
import random
import re
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal, NoReturn

import sentencepiece
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

from data_prep.request_file import LOCK, belongs_to_request, lock_output, remove_request, request_hash, write_request
from data_prep.source_options import SourceOptions
from data_prep.sources import LeftOut, list_input_splits, read_input_split, source_state
from data_prep.tokenizer.existing import MAX_WORD_CHARS, LoadedTokenizer, load_tokenizer, use_bert_components
from data_prep.tokenizer.from_sentencepiece import differing_lines, to_fast_tokenizer, user_defined_symbols
from megabert.config import cli
from megabert.config.settings import setting
from megabert.data.shards.manifest import MANIFEST, TOKENIZER, TOKENIZER_CONFIG
from megabert.data.shards.sample_format import SPECIAL_TOKENS
from megabert.data.shards.tokenizer import read_tokenizer, special_tokens
from megabert.files.atomic import write_atomically
from megabert.process.error_text import one_line

# A sample comes from at least this many input splits of the corpus, if it has them.
SAMPLED_SPLITS = 16
COMPARED_LINES = 10_000
# Characters of a line, each of at most 4 bytes.
LINE_CHARACTERS = 1000

SENTENCEPIECE_MODEL = "tokenizer.model"
# Version of the files that this command writes. Tokenizers of another version are made again.
TOKENIZER_FORMAT = 2


@dataclass(frozen=True, kw_only=True)
class Options(SourceOptions):
    out: str = setting("data/quickstart/tokenizer", is_output=True)
    """folder to write tokenizer.json and tokenizer_config.json to (and tokenizer.model, if from sentencepiece)"""
    existing: str | None = None
    """convert this instead of training: vocab.txt, a sentencepiece .model, tokenizer.json, or a Hugging Face folder"""
    vocab_size: int = setting(8192, "[6, 2^24]")
    """number of pieces, including special tokens"""
    model: Literal["unigram", "bpe", "wordpiece", "byte_bpe"] = "unigram"
    """type of the model: unigram or bpe of sentencepiece, wordpiece as in BERT, or byte_bpe: BPE of bytes, without
    [UNK], as in ModernBERT"""
    lowercase: bool = True
    """whether to fold case, as bert-base-uncased does; applies to an existing vocab.txt too"""
    sample_bytes: int = setting(10_000_000, "[1, 2^40]")
    """text to train on, bytes; more takes longer and changes little"""
    seed: int = setting(0, "[0, 2^63)")
    """seed of the sample"""


def sample_lines(options: Options) -> Iterator[str]:
    """Yield lines of input splits in random order, about sample_bytes in all. Only a part of a large split is read."""
    left_out = LeftOut(options.read.skip_damaged)
    splits = list_input_splits(options.source, options.read, left_out)
    random.Random(options.seed).shuffle(splits)
    read = 0
    for number, split in enumerate(splits):
        share = (options.sample_bytes - read) / max(1, min(SAMPLED_SPLITS, len(splits)) - number)
        limit = read + share
        for document in read_input_split(split, options.read, left_out):
            for line in document.splitlines():
                if line := line.strip():
                    read += len(line.encode("utf-8", "replace"))
                    yield line
            if read >= limit:
                break
        if read >= options.sample_bytes:
            return


def train(options: Options) -> LoadedTokenizer:
    """Train a tokenizer. Raises ValueError if the corpus is too small."""
    if options.model == "wordpiece":
        return LoadedTokenizer(train_wordpiece(options))
    if options.model == "byte_bpe":
        return LoadedTokenizer(train_byte_bpe(options))
    model = train_sentencepiece(options)
    return LoadedTokenizer(to_fast_tokenizer(model), model)


def train_wordpiece(options: Options) -> Tokenizer:
    unknown = SPECIAL_TOKENS["unk"]
    tokenizer = Tokenizer(models.WordPiece(unk_token=unknown, max_input_chars_per_word=MAX_WORD_CHARS))
    use_bert_components(tokenizer, options.lowercase)
    trainer = trainers.WordPieceTrainer(
        vocab_size=options.vocab_size,
        min_frequency=2,
        # As in BERT, rarer characters become [UNK].
        limit_alphabet=1000,
        special_tokens=list(SPECIAL_TOKENS.values()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(sample_lines(options), trainer)
    if tokenizer.get_vocab_size() <= len(SPECIAL_TOKENS):
        raise ValueError(f"{options.source}: has no text to train on. Use more text.")
    if (needed := tokenizer.get_vocab_size()) > options.vocab_size:
        raise ValueError(
            f"{options.source}: {options.vocab_size} pieces are fewer than its characters. Pass --vocab-size {needed} "
            "or more."
        )
    return tokenizer


def train_byte_bpe(options: Options) -> Tokenizer:
    tokenizer = Tokenizer(models.BPE(unk_token=SPECIAL_TOKENS["unk"]))
    folding = [normalizers.Lowercase()] if options.lowercase else []
    tokenizer.normalizer = normalizers.Sequence([normalizers.NFC(), *folding])
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    if options.vocab_size < (needed := len(alphabet) + len(SPECIAL_TOKENS)):
        raise ValueError(f"{options.vocab_size} pieces are fewer than all bytes. Pass --vocab-size {needed} or more.")
    trainer = trainers.BpeTrainer(
        vocab_size=options.vocab_size,
        min_frequency=2,
        special_tokens=list(SPECIAL_TOKENS.values()),
        initial_alphabet=alphabet,
        show_progress=False,
    )
    lines = iter(sample_lines(options))
    if (first := next(lines, None)) is None:
        raise ValueError(f"{options.source}: has no text to train on. Use more text.")
    tokenizer.train_from_iterator(itertools.chain([first], lines), trainer)
    return tokenizer


def train_sentencepiece(options: Options) -> bytes:
    """Train a sentencepiece model. Returns the bytes of its file. Raises ValueError if the corpus is too small."""
    model = io.BytesIO()
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=short_lines(sample_lines(options)),
            model_writer=model,
            model_type=options.model,
            vocab_size=options.vocab_size,
            normalization_rule_name="nmt_nfkc_cf" if options.lowercase else "nmt_nfkc",
            character_coverage=0.9995,
            pad_id=0,
            unk_id=1,
            bos_id=2,
            eos_id=3,
            pad_piece=SPECIAL_TOKENS["pad"],
            unk_piece=SPECIAL_TOKENS["unk"],
            bos_piece=SPECIAL_TOKENS["cls"],
            eos_piece=SPECIAL_TOKENS["sep"],
            control_symbols=[SPECIAL_TOKENS["mask"]],
            minloglevel=2,
        )
    except RuntimeError as error:
        raise ValueError(f"{options.source}: {explain_failure(str(error), options.vocab_size)}") from error
    return model.getvalue()


def explain_failure(message: str, vocab_size: int) -> str:
    """Say what to do about an error of sentencepiece's trainer."""
    if "sentences_.empty()" in message:
        return "has no text to train on. Use more text."
    if needed := re.search(r"smaller than required_chars\. \d+ vs (\d+)", message):
        return f"{vocab_size} pieces are fewer than its characters. Pass --vocab-size {needed[1]} or more."
    if most := re.search(r"set it to a value <= (\d+)", message):
        return f"has not enough text for {vocab_size} pieces. Use more text, or pass --vocab-size {most[1]} or less."
    return f"sentencepiece cannot train {vocab_size} pieces on it: {one_line(message)}"


def short_lines(lines: Iterable[str]) -> Iterator[str]:
    """Cut long lines, if possible at a space. sentencepiece leaves out lines that are longer than 4,192 bytes."""
    for line in lines:
        begin = 0
        while len(line) - begin > LINE_CHARACTERS:
            last = begin + LINE_CHARACTERS
            end = line.rfind(" ", begin + LINE_CHARACTERS // 2, last) + 1 or last
            yield line[begin:end]
            begin = end
        yield line[begin:]


def apply_bert_conventions(tokenizer: Tokenizer) -> None:
    """Add BERT's missing special tokens, wrap texts in [CLS] and [SEP], and disable truncation and padding.

    A tokenizer with Gemma's special tokens keeps these instead.
    """
    names = special_tokens(tokenizer)
    tokenizer.add_special_tokens(list(names.values()))
    cls, sep = (names[name] for name in ("cls", "sep"))
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{cls} $A {sep}",
        pair=f"{cls} $A {sep} $B:1 {sep}:1",
        special_tokens=[(token, tokenizer.token_to_id(token)) for token in (cls, sep)],
    )
    tokenizer.no_padding()
    tokenizer.no_truncation()
    tokenizer.encode_special_tokens = False


def write_tokenizer(tokenizer: Tokenizer, folder: Path) -> None:
    """Write tokenizer.json, and the tokenizer_config.json with which AutoTokenizer loads it."""
    folder.mkdir(parents=True, exist_ok=True)
    write_atomically(folder / TOKENIZER, tokenizer.to_str(pretty=False).encode())
    config: dict[str, object] = {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False}
    config |= {f"{name}_token": token for name, token in special_tokens(tokenizer).items()}
    config["model_input_names"] = ["input_ids", "token_type_ids", "attention_mask"]
    write_atomically(folder / TOKENIZER_CONFIG, json.dumps(config, indent=1).encode())


def compare_with_sentencepiece(options: Options, sentencepiece_model: bytes) -> str:
    """Encode lines of the corpus with tokenizer.json and with sentencepiece. Returns a report of the differences."""
    tokenizer = read_tokenizer(Path(options.out, TOKENIZER))
    lines = list(itertools.islice(sample_lines(options), COMPARED_LINES))
    differing = differing_lines(tokenizer, sentencepiece_model, lines)
    report = f"{len(differing)} of {len(lines):,} lines of the corpus differ from sentencepiece's own ids"
    report += f", such as {differing[0][:80]!r}" if differing else ""
    symbols = differing_lines(tokenizer, sentencepiece_model, user_defined_symbols(sentencepiece_model))
    report += f"; user-defined symbols that differ: {' '.join(symbols)}" if symbols else ""
    return report + (". See data_prep/README.md" if differing or symbols else "")


def hash_of_request(options: Options) -> str:
    """Hash the options and the state of the files that the tokenizer is made from."""
    if options.existing:
        path = Path(options.existing)
        files = [
            file
            for file in (sorted(path.iterdir()) if path.is_dir() else [path])
            if file.is_file() and file.name != LOCK
        ]
        state = [[file.name, file.stat().st_size, file.stat().st_mtime_ns] for file in files]
    else:
        state = source_state(list_input_splits(options.source, options.read, LeftOut(options.read.skip_damaged)))
    return request_hash(options=asdict(options), source=state)


def check_no_shards(folder: Path) -> None:
    """Raise ValueError for a folder of shards, which could not be used with another tokenizer."""
    if (folder / MANIFEST).exists() or (folder / ".work").exists():
        raise ValueError(f"{folder}: holds shards, whose tokenizer would be replaced. Choose another --out.")


def main(argv: list[str] | None = None, prog: str = "data_prep/train_tokenizer.py") -> None:
    options = cli.read_flags(Options, prog, __doc__ or "", argv)
    folder = Path(options.out)
    check_no_shards(folder)
    request = hash_of_request(options)
    if belongs_to_request(folder, TOKENIZER_FORMAT, request):
        print(f"{folder / TOKENIZER}: already made from this with these settings, reused")
        return
    lock = lock_output(folder, LOCK, "train_tokenizer.py")
    try:
        _make(options, folder, request)
    finally:
        lock.release()


def _make(options: Options, folder: Path, request: str) -> None:
    tokenizer, model = load_tokenizer(Path(options.existing), options.lowercase) if options.existing else train(options)
    # Another command may have begun to write them meanwhile.
    check_no_shards(folder)
    # Some files in the folder belong to another request until all are replaced.
    remove_request(folder)
    apply_bert_conventions(tokenizer)
    write_tokenizer(tokenizer, folder)
    (folder / SENTENCEPIECE_MODEL).unlink(missing_ok=True)
    print(f"{folder / TOKENIZER}: {tokenizer.get_vocab_size()} pieces ({options.existing or options.model})")
    if model is not None:
        write_atomically(folder / SENTENCEPIECE_MODEL, model)
        print(cli.name_commands(compare_with_sentencepiece(options, model)))
    written = (TOKENIZER, TOKENIZER_CONFIG, *([] if model is None else [SENTENCEPIECE_MODEL]))
    write_request(folder, TOKENIZER_FORMAT, request, written)


def command(prog: str = "megabert-tokenizer") -> NoReturn:
    cli.run(lambda: main(prog=prog), prog)


if __name__ == "__main__":
    command(sys.argv[0])
