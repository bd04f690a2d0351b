"""Speed of write_shards.py compared with the bare tokenizer on the same text and cores.

Both run in processes of their own, in turn. The whole command is timed: start-up, reading, hashing, tokenizing,
shuffling, writing, checksums and statistics. Of the bare tokenizer only encode_batch_fast is timed, with its own
threads on all cores.
"""

import json
import os
import shutil
import statistics
import subprocess
import sys
import time
from pathlib import Path

from data_prep.sources import ReadOptions, list_input_splits, read_input_split

REPOSITORY = Path(__file__).resolve().parents[3]
FULL_BYTES, QUICK_BYTES = 96_000_000, 8_000_000
ROUNDS = 3

# Prints the seconds that encode_batch_fast takes for all texts of a corpus, some MB at a time.
BARE = """
import json, sys, time
from tokenizers import Tokenizer
texts = [json.loads(line)["text"] for line in open(sys.argv[1])]
tokenizer = Tokenizer.from_file(sys.argv[2])
tokenizer.encode_special_tokens = True
tokenizer.encode_batch_fast(texts[:1000], add_special_tokens=False)
begin = time.perf_counter()
for at in range(0, len(texts), 4096):
    tokenizer.encode_batch_fast(texts[at : at + 4096], add_special_tokens=False)
print(time.perf_counter() - begin)
"""


def write_corpus(path: Path, size: int) -> int:
    """Write docstrings as .jsonl until `size` bytes, in as many passes as necessary. Returns the bytes of text."""
    units = list_input_splits("docstrings", ReadOptions())
    written = passes = 0
    with open(path, "w") as file:
        while written < size:
            for text in (text for unit in units for text in read_input_split(unit, ReadOptions())):
                if len(text) < 200:
                    continue
                # write_shards.py drops copies of a text, so later passes prefix their number.
                document = f"Pass {passes}. {text}" if passes else text
                file.write(json.dumps({"text": document}, ensure_ascii=False) + "\n")
                written += len(document.encode())
                if written >= size:
                    break
            passes += 1
    return written


def time_bare(corpus: Path, tokenizer: Path) -> float:
    command = [sys.executable, "-c", BARE, str(corpus), str(tokenizer / "tokenizer.json")]
    environment = os.environ | {"TOKENIZERS_PARALLELISM": "true"}
    return float(subprocess.run(command, env=environment, check=True, capture_output=True, text=True).stdout)


def time_write_shards(corpus: Path, tokenizer: Path, out: Path) -> float:
    shutil.rmtree(out, ignore_errors=True)
    command = [
        sys.executable,
        "data_prep/write_shards.py",
        f"--source={corpus}",
        f"--tokenizer={tokenizer}",
        f"--out={out}",
    ]
    begin = time.perf_counter()
    subprocess.run(command, cwd=REPOSITORY, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    return time.perf_counter() - begin


def measure(corpus: Path, tokenizer: Path, scratch: Path, quick: bool) -> dict[str, float]:
    """Return the median of per-round ratios. quick: subtract the time of starting up."""
    size, out, little = corpus.stat().st_size / 1e6, scratch / "tokens-again", scratch / "little.jsonl"
    write_corpus(little, 20_000)
    bare, whole = [], []
    for _ in range(ROUNDS):
        bare.append(time_bare(corpus, tokenizer))
        start_up = time_write_shards(little, tokenizer, out) if quick else 0.0
        whole.append(time_write_shards(corpus, tokenizer, out) - start_up)
    if quick:
        print(f"  without {start_up:.1f} s of starting up, which are only counted without --quick")
    rates = (size / statistics.median(times) for times in (whole, bare))
    print("  write_shards {:.2f} MB/s, the bare tokenizer {:.2f} MB/s, on all cores".format(*rates))
    return {"write_shards_vs_bare_tokenizer": statistics.median(b / w for b, w in zip(bare, whole, strict=True))}
