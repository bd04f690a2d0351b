"""The acceptance of MegaBERT on one GPU: nine parts, a table, and a JSON file of each part.

    python tests/gpu/accept.py --out DIR [--tokens SHARDS] [--only 0,2] [--seconds 560] [--dry-run]

Each part is a process of its own with a limit of time, together twenty-two minutes; a part that fails does not stop
the others, and one for which --seconds leaves no time fails. Exit code 1 if one of the parts 1 to 5 or 8 failed. It
needs no network, only torch from 2.11, Triton from 3.6, this package's other requirements, and the quickstart's shards
(bash launch/quickstart/prepare.sh). --dry-run walks all parts on the CPU with a tiny model. It has not been run on a
GPU yet.
"""

import argparse
import json
import math
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import NamedTuple

REPOSITORY = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(REPOSITORY), str(REPOSITORY / "tests/benchmarks")]

from megabert.process.subprocesses import kill_with_children  # noqa: E402
from tests.gpu import kernel_times, parts, speeds  # noqa: E402


class Part(NamedTuple):
    name: str
    limit_s: int
    expected: str
    run: object


# A part starts up to nine processes. Each loads torch and DeepSpeed and sets the GPU up: a dozen seconds from a warm
# disk. The first ones also compile kernels.
PARTS = [
    Part("machine", 60, "all operations from Triton", parts.machine),
    Part("kernels", 180, "all tests pass", parts.kernels),
    Part(
        "host's waits",
        120,
        f"at most {parts.MOST_WAITS} (0); ZeRO 1: {parts.MOST_WAITS + 1} (0); ZeRO 2: and one in each",
        parts.host_waits,
    ),
    Part("curves", 150, "differences below 1e-3, 2e-2, 1e-4", parts.curves),
    Part("crash", 150, "the same losses, 1 update skipped", parts.crash),
    Part("speeds", 300, f"{100 * speeds.LEAST_OF_PREDICTION:.0f} % of launch/estimate.py's tokens/s", speeds.speeds),
    Part("kernel times", 150, f"{100 * kernel_times.LEAST_SHARE:.0f} % of the bandwidth", kernel_times.kernel_times),
    Part("profile", 60, "trace below 16 MiB", parts.where_time_goes),
    Part("CUDA graphs", 150, f"losses within {parts.SAME_GRAPHS:g} of run.cuda_graphs false", parts.graphs),
]
REQUIRED = (1, 2, 3, 4, 5, 8)


def run_part(number: int, options: argparse.Namespace) -> None:
    """Run one part in this process, and write its JSON file."""
    out = options.out / f"part{number}"
    out.mkdir(parents=True, exist_ok=True)
    outcome = PARTS[number].run(parts.Setup(out, options.tokens, options.dry_run))  # type: ignore[operator]
    (options.out / f"{number}.json").write_text(json.dumps(outcome._asdict(), indent=1, default=str))


def start_part(number: int, options: argparse.Namespace, left_s: float) -> dict[str, object]:
    """Run one part in a process of its own. Returns what it wrote, or why it failed. left_s: of --seconds."""
    command = [
        sys.executable,
        __file__,
        "--part",
        str(number),
        "--out",
        str(options.out),
        "--tokens",
        str(options.tokens),
    ]
    result = options.out / f"{number}.json"
    result.unlink(missing_ok=True)
    env = os.environ | {"DS_ACCELERATOR": "cpu" if options.dry_run else "cuda"}
    process = subprocess.Popen(
        command + (["--dry-run"] if options.dry_run else []), env=env, stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT, text=True,
    )  # fmt: skip
    limit = max(0.0, min(left_s, PARTS[number].limit_s * (5 if options.dry_run else 1)))
    try:
        output = process.communicate(timeout=limit)[0]
    except subprocess.TimeoutExpired:
        kill_with_children(process.pid)
        output = f"{process.communicate()[0]}\nit ran longer than {limit:.0f} s"
    if result.is_file():
        return json.loads(result.read_text())
    lines = output.strip().splitlines() or [f"exit code {process.returncode}"]
    failed: dict[str, object] = {"passed": False, "figure": lines[-1][:100], "found": {"output": output[-4000:]}}
    result.write_text(json.dumps(failed, indent=1))
    return failed


def part_numbers(text: str) -> list[int]:
    """Read --only. Raises ArgumentTypeError, of which argparse makes a message and exit code 2."""
    known = {str(number): number for number in range(len(PARTS))}
    if wrong := [word for word in text.split(",") if word not in known]:
        last = len(PARTS) - 1
        raise argparse.ArgumentTypeError(f"{text} has the part {wrong[0]!r}, expected numbers from 0 to {last}: 0,2")
    return [known[word] for word in text.split(",")]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder for the JSON files and logs")
    parser.add_argument("--tokens", type=Path, default=REPOSITORY / "data/quickstart/tokens", help="token shards")
    numbers = list(range(len(PARTS)))
    parser.add_argument("--only", type=part_numbers, default=numbers, help="parts to run, such as 0,2; default: all")
    parser.add_argument("--seconds", type=float, default=math.inf, help="limit of all parts together; default: none")
    parser.add_argument("--dry-run", action="store_true", help="a tiny model on the CPU")
    parser.add_argument("--part", type=int, choices=numbers, help=argparse.SUPPRESS)
    options = parser.parse_args()
    options.out = options.out.resolve()
    if not (options.tokens / "manifest.json").is_file():
        parser.error(f"{options.tokens} has no manifest.json. Run bash launch/quickstart/prepare.sh, or pass --tokens.")
    if options.part is not None:
        run_part(options.part, options)
        return 0
    if not options.dry_run and not parts.torch.cuda.is_available():
        parser.error("torch sees no GPU here. --dry-run walks all parts on the CPU.")
    options.out.mkdir(parents=True, exist_ok=True)
    print("| part | passed | s | figure | expected |\n|---|---|---|---|---|", flush=True)
    passed = {}
    end = time.perf_counter() + options.seconds
    for number in options.only:
        began = time.perf_counter()
        result = start_part(number, options, end - began)
        passed[number] = bool(result["passed"])
        cells = [f"{number} {PARTS[number].name}", "yes" if passed[number] else "NO"]
        cells += [f"{time.perf_counter() - began:.0f}", str(result["figure"]), PARTS[number].expected]
        print(f"| {' | '.join(cells)} |", flush=True)
    return int(not all(passed[number] for number in options.only if number in REQUIRED))


if __name__ == "__main__":
    sys.exit(main())
