"""How fast write_shards.py is, as a share of the bare tokenizer on the same text and cores.

    python tests/benchmarks/bench_prepare.py [--quick] [--json FILE]

Both run in processes of their own, one after the other, several times; the medians are compared. The command is timed
whole: start-up, reading, hashing, tokenizing, shuffling, writing, checksums, statistics. Of the bare tokenizer only
encode_batch_fast is timed, with its own threads on all cores.
"""

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from data_prep import train_tokenizer
from data_prep.sources import ReadOptions, list_units, read_unit

REPOSITORY = Path(__file__).resolve().parents[2]
FULL_BYTES, QUICK_BYTES = 96_000_000, 8_000_000
FULL_RUNS, QUICK_RUNS = 3, 1
MUST_REACH = 0.80

# Given a corpus and a tokenizer: seconds that encode_batch_fast takes for all texts, some MB at a time.
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
    """Write docstrings as .jsonl, each document once in a pass over them, until `size` bytes. Returns bytes of text."""
    units = list_units("docstrings", ReadOptions())
    written = passes = 0
    with open(path, "w") as file:
        while written < size:
            for text in (text for unit in units for text in read_unit(unit, ReadOptions())):
                if len(text) < 200:
                    continue
                # Copies would be dropped: those of a later pass say which it is.
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


def measure(quick: bool) -> dict[str, float]:
    """Figures by their names in the results' JSON."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        corpus, tokenizer = folder / "corpus.jsonl", folder / "tokenizer"
        size = write_corpus(corpus, QUICK_BYTES if quick else FULL_BYTES) / 1e6
        train_tokenizer.main([f"--source={corpus}", f"--out={tokenizer}"])
        bare, whole = [], []
        for _ in range(QUICK_RUNS if quick else FULL_RUNS):
            bare.append(size / time_bare(corpus, tokenizer))
            whole.append(size / time_write_shards(corpus, tokenizer, folder / "tokens"))
    bare_rate, whole_rate = statistics.median(bare), statistics.median(whole)
    return {
        "bare_tokenizer_mb_per_s": bare_rate,
        "write_shards_mb_per_s": whole_rate,
        "write_shards_vs_bare_tokenizer": whole_rate / bare_rate,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="little text, once: start-up weighs more")
    parser.add_argument("--json", type=Path, help="file to write the figures to")
    options = parser.parse_args()
    figures = measure(options.quick)
    for name, figure in figures.items():
        print(
            f"{name:34} {figure:8.2f}" + (f"   (>= {MUST_REACH})" if name == "write_shards_vs_bare_tokenizer" else "")
        )
    if options.json:
        options.json.write_text(json.dumps(figures, indent=1) + "\n")


if __name__ == "__main__":
    main()
