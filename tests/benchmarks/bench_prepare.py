"""Preparing on many machines: equal bytes in separate tasks and on Ray, and the reads of the second pass at any size.

    python tests/benchmarks/bench_prepare.py [--quick] [--json FILE]

prep_tasks_equal and ray_equal are 1 if every file has the bytes of one command (ray_equal needs the package ray, and
starts a cluster of two nodes on this machine). The reads are counted by the code that plans them, for tasks of 256 MB
of text that become 58 million tokens of 2 bytes each, and shards of 64 MB.
"""

import hashlib
import tempfile
from importlib.util import find_spec
from pathlib import Path

import numpy as np
from support import preparing
from support.report import read_arguments, write

from data_prep import train_tokenizer, write_shards
from data_prep.sources import ReadOptions
from data_prep.writing import merged_runs, passes
from data_prep.writing.shard_options import Options
from data_prep.writing.sorted_runs import TaskSummary, WriteSettings

# Of English with a vocabulary of 30,000.
TEXT_BYTES_PER_TOKEN = 4.4
# Of each step.
PARTS = 3
QUICK_BYTES, FULL_BYTES = 2_000_000, 20_000_000


def hashes(folder: Path) -> dict[str, str]:
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in folder.iterdir() if path.is_file()}


def write_in_tasks(flags: list[str], out: Path) -> None:
    for step in ("plan", *passes_with_parts(), "finish"):
        parts = [f"--task={n}/{PARTS}" for n in range(PARTS)] if step in passes_with_parts() else ["--task=0/1"]
        for part in parts:
            write_shards.main([*flags, f"--out={out}", f"--step={step}", part])


def passes_with_parts() -> tuple[str, ...]:
    return "runs", "merge", "shards"


def write_on_ray(flags: list[str], out: Path) -> None:
    from ray.cluster_utils import Cluster  # pyrefly: ignore[missing-import]

    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1})
    cluster.add_node(num_cpus=1)
    try:
        write_shards.main([*flags, f"--out={out}", "--engine=ray", f"--ray_address={cluster.address}"])
    finally:
        cluster.shutdown()


def count_reads(text_bytes: int) -> dict[str, float]:
    """Plan the second pass of a corpus as the command does, and count its reads before and after the merge."""
    tasks = -(-text_bytes // passes.TASK_BYTES)
    elements = round(text_bytes / tasks / TEXT_BYTES_PER_TOKEN)
    summary = TaskSummary(1, 1, {"train": elements, "heldout": 0}, 1.0, {}, {}, 0)
    settings = WriteSettings(Path("out"), None, np.dtype(np.uint16), ReadOptions(), 1, 0.0, True, 131_072, 0)
    counts = passes.shard_counts(Options(), settings.dtype, [summary] * tasks)
    reads = merged_runs.plan_reads(settings, [summary] * tasks, counts)
    shards, total = sum(counts.values()), 2 * elements * tasks
    merge_reads = 0
    for group in reads.groups:
        size = 2 * elements * len(group.runs)
        together = max(1, shards * merged_runs.sorted_runs.RUN_BYTES // size)
        merge_reads += len(group.runs) * -(-shards // together)
    return {
        "runs": tasks,
        "shards": shards,
        "reads_unmerged": tasks * shards,
        "kb_unmerged": total / (tasks * shards) / 1000,
        "files": len(reads.files),
        "reads": len(reads.files) * shards,
        "kb": total / (len(reads.files) * shards) / 1000,
        "merge_reads": merge_reads,
        "merge_kb": total / merge_reads / 1000 if merge_reads else 0.0,
    }


def main() -> None:
    arguments = read_arguments(__doc__ or "")
    figures: dict[str, float] = {}
    columns = ("size", "runs", "shards", "reads without merge", "kB", "files", "reads", "kB", "reads of merge", "kB")
    print("".join(f"{name:>21}" if "reads" in name else f"{name:>9}" for name in columns))
    for name, size in (("100GB", 10**11), ("1TB", 10**12), ("10TB", 10**13)):
        found = count_reads(size)
        figures |= {f"{key}_{name}": value for key, value in found.items()}
        print(f"{name:>9}" + "".join(f"{v:21,.0f}" if "reads" in k else f"{v:9,.1f}" for k, v in found.items()))
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        corpus, tokenizer = folder / "corpus.jsonl", folder / "tokenizer"
        preparing.write_corpus(corpus, QUICK_BYTES if arguments.quick else FULL_BYTES)
        train_tokenizer.main([f"--source={corpus}", f"--out={tokenizer}", "--vocab-size=8192"])
        flags = [f"--source={corpus}", f"--tokenizer={tokenizer}", "--heldout=0.01"]
        write_shards.main([*flags, f"--out={folder / 'whole'}"])
        expected = hashes(folder / "whole")
        write_in_tasks(flags, folder / "tasks")
        figures["prep_tasks_equal"] = float(hashes(folder / "tasks") == expected)
        if find_spec("ray") is not None:
            write_on_ray(flags, folder / "ray")
            figures["ray_equal"] = float(hashes(folder / "ray") == expected)
        else:
            print("ray_equal is not measured: pip install 'megabert[ray]'")
    for name in ("prep_tasks_equal", "ray_equal"):
        if name in figures:
            print(f"{name:20} {figures[name]:.0f}")
    write(figures, arguments.json)


if __name__ == "__main__":
    main()
