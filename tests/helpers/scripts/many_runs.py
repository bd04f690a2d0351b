"""Several pretraining runs, one after the other, in one process per rank: torch and DeepSpeed load only once.

Imported by tests for `run_many`, which starts this file as every rank with the runs' flags as JSON in RUNS.
"""

import json
import logging
import os
import resource
import sys
from pathlib import Path

from tests.helpers import warm
from tests.helpers.ports import free_port
from tests.helpers.runs import TINY, Corpus, Finished, last_of_each


def flags_of(corpus: Corpus, out: Path, ds_config: Path, *more: str) -> list[str]:
    """Return the flags of a run of the tiny recipe."""
    flags = [f"--ds_config={ds_config}", f"--data.train={corpus.tokens}", f"--run.output_dir={out}", *TINY, *more]
    return last_of_each(flags)


def run_many(
    runs: list[list[str]], ranks: int = 1, timeout_s: float = 300, max_file_bytes: dict[int, int] | None = None
) -> Finished:
    """Run these flags one after the other on `ranks` ranks. Returns the first exit code but 0, and each rank's output.

    max_file_bytes: by rank, the largest file that it may write, as if its disk were full.
    """
    port = str(free_port())
    processes = []
    for rank in range(ranks):
        env = os.environ | {
            "DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1", "RUNS": json.dumps(runs),
            "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(ranks), "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": port, "MAX_FILE_BYTES": str((max_file_bytes or {}).get(rank, resource.RLIM_INFINITY)),
        }  # fmt: skip
        processes.append(warm.popen([sys.executable, "tests/helpers/scripts/many_runs.py"], env))
    try:
        output = "".join(process.communicate(timeout=timeout_s)[0] for process in processes)
    finally:
        for process in processes:
            process.kill()
    return Finished(next((process.returncode for process in processes if process.returncode), 0), output)


def main() -> None:
    import deepspeed

    from megabert.config.cli import exit_code
    from megabert.config.ds_config import read_ds_config
    from megabert.config.recipe_parser import RecipeParser
    from megabert.training import loop
    from megabert.training.distributed.signals import StopSignals

    logging.basicConfig(level=logging.INFO if os.environ["RANK"] == "0" else logging.WARNING, format="%(message)s")
    limit = int(os.environ["MAX_FILE_BYTES"])
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
    # The process group is for the next run too.
    loop.shutdown = lambda feed: deepspeed.comm.barrier()
    parser = RecipeParser("many_runs.py")
    parser.add_argument("--ds_config")
    code = 0
    signals = StopSignals()
    signals.install_handlers()
    for flags in json.loads(os.environ["RUNS"]):
        recipe, options = parser.read(flags)
        try:
            code = loop.pretrain(recipe, read_ds_config(options.ds_config), signals)
        except (ValueError, OSError) as error:
            sys.stderr.write(f"pretrain: {error}\n")
            code = exit_code(error)
        if code:
            break
    sys.stdout.flush()
    sys.stderr.flush()
    # As launch/pretrain.py does.
    os._exit(code)


if __name__ == "__main__":
    main()
