"""Measure export and import (seconds, peak memory), and the encoding speed of an exported folder and of BertModel.

    python tests/benchmarks/bench_convert.py [--quick] [--json FILE]

Checkpoints are as two ranks at ZeRO 3 write them. Seconds include the export check. Peak memory is that of the command
and its children together, sampled every 20 ms, including pages of mapped files. Texts are paragraphs of the docstrings
of installed packages, cut at 512 tokens. The two models of the speed comparison take turns, and the median of the
batches' ratios is printed.
"""

import itertools
import json
import random
import subprocess
import sys
import tempfile
import threading
import time
from importlib.util import find_spec
from pathlib import Path

import psutil
from support.report import read_arguments, write

from data_prep import train_tokenizer
from data_prep.sources.docstrings import docstrings

REPOSITORY = Path(__file__).resolve().parents[2]
STEPS = [sys.executable, "-m", "tests.benchmarks.support.convert_steps"]
PACKAGES = ("torch", "numpy")


def read_texts() -> list[str]:
    """Return paragraphs, shuffled with a fixed seed, so that a batch contains text of many files."""
    found: set[str] = set()
    for package in PACKAGES:
        spec = find_spec(package)
        assert spec is not None
        assert spec.submodule_search_locations is not None
        files = sorted(Path(spec.submodule_search_locations[0]).rglob("*.py"))[::7]
        for text in itertools.chain.from_iterable(docstrings(file) for file in files):
            found |= {" ".join(part.split()) for part in text.split("\n\n")}
    texts = sorted(text for text in found if len(text) >= 20)
    random.Random(0).shuffle(texts)
    return texts


def run(command: list[str]) -> dict:
    """Run one step in its own process. Adds peak_gb, the peak memory of its process tree."""
    process = subprocess.Popen(command, cwd=REPOSITORY, stdout=subprocess.PIPE, text=True)
    peak, done = 0, threading.Event()

    def watch() -> None:
        nonlocal peak
        while not done.wait(0.02):
            peak = max(peak, tree_bytes(process.pid))

    watcher = threading.Thread(target=watch)
    watcher.start()
    output, _ = process.communicate()
    done.set()
    watcher.join()
    if process.returncode:
        raise RuntimeError(f"{' '.join(command)} ended with exit code {process.returncode}")
    return json.loads(output.strip().splitlines()[-1]) | {"peak_gb": peak / 2**30}


def tree_bytes(pid: int) -> int:
    total = 0
    try:
        root = psutil.Process(pid)
        family = [root, *root.children(recursive=True)]
    except psutil.NoSuchProcess:
        return 0
    for member in family:
        try:
            total += member.memory_info().rss
        except psutil.NoSuchProcess:
            continue
    return total


def show(what: str, measured: dict) -> None:
    print(f"| {what} | {measured['seconds']:.1f} | {measured['peak_gb']:.2f} |", flush=True)


def main() -> None:
    options = read_arguments(__doc__ or "")
    began = time.perf_counter()
    figures: dict[str, float] = {}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        texts = read_texts()
        (folder / "texts.json").write_text(json.dumps(texts))
        sample = folder / "sample.jsonl"
        sample.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts[:4000]))
        train_tokenizer.main([f"--source={sample}", f"--out={folder / 'tokenizer'}", "--vocab_size=4000"])
        print(f"\n{time.perf_counter() - began:.0f} s to make texts and tokenizer\n")
        print("| | seconds | peak GB |\n|---|---|---|")
        run([*STEPS, "checkpoints", str(folder), str(folder / "tokenizer")])
        for scale in ("base", "large"):
            paths = {part: str(folder / f"{scale}-{part}") for part in ("run", "hf", "ours", "published", "back")}
            exported = run([*STEPS, "export", paths["run"], paths["hf"]])
            show(f"export {scale}", exported)
            figures |= {f"export_seconds_{scale}": exported["seconds"], f"export_peak_gb_{scale}": exported["peak_gb"]}
            subprocess.run(["rm", "-r", paths["run"]], check=True)
            if options.quick:
                continue
            imported = run([*STEPS, "import", paths["hf"], paths["ours"]])
            show(f"import {scale}", imported)
            figures |= {f"import_seconds_{scale}": imported["seconds"], f"import_peak_gb_{scale}": imported["peak_gb"]}
            run([*STEPS, "export-mosaicbert", paths["hf"], paths["published"]])
            subprocess.run(["rm", "-r", paths["ours"]], check=True)
            show(f"import {scale}, published layout", run([*STEPS, "import", paths["published"], paths["back"]]))
            subprocess.run(["rm", "-r", paths["published"], paths["back"]], check=True)
        encode = [
            sys.executable,
            "-P",
            str(Path(__file__).with_name("support") / "encode_texts.py"),
            str(folder / "base-hf"),
        ]
        # Smaller batches have less padding to avoid.
        size, rounds = 32, 2 if options.quick else 12
        speed = run([*encode, str(folder / "texts.json"), str(size), str(rounds)])
    figures["encode_vs_hf_bert"] = speed["ratio"]
    lengths = (
        f"{speed['mean_length']:.0f} tokens on average, median {speed['median_length']:.0f}, longest {speed['longest']}"
    )
    print(f"\n{speed['texts']} texts, {lengths}")
    print(f"\n| base size, fp32, batches of {size} | sentences/s |\n|---|---|")
    print(f"| exported MosaicBERT, megabert absent | {speed['ours']:.1f} |")
    print(f"| transformers' BertModel | {speed['theirs']:.1f} |")
    print(f"\nfaster by {speed['ratio']:.2f}; the whole took {time.perf_counter() - began:.0f} s")
    write(figures, options.json)


if __name__ == "__main__":
    main()
