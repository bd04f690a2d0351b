"""Check that a pretraining run survives kills, full disks and damaged checkpoints when it is started again.

    python tests/benchmarks/fault_injection.py --rounds 100 --seed 1 [--quick] [--json FILE]
    python tests/benchmarks/fault_injection.py --commands --rounds 60    # kills the commands around pretraining

Every round is a small real run on 1 rank, or on 2 through the deepspeed launcher, with one fault at a random moment,
often while a checkpoint is written. It is started again with the same command until it ends, and must then have the
same weights, bit for bit, as an undisturbed run. Figures:
identical       rounds with the same weights
lost_samples    bins that were missed or trained on twice, not counting steps that a resume did again
A full disk and a read-only folder are made with a tmpfs if one can be mounted (as root), otherwise with a limit on
file sizes (ulimit -f) and by permissions. Exits with 1 if a round is not identical or loses a bin.

With --commands every round kills train_tokenizer.py, write_shards.py, convert_to_hf.py, convert_from_hf.py or
finetune_glue.py with SIGKILL, SIGTERM or SIGINT, and starts it again with the same command. Figures:
kills           rounds
same_bytes      rounds whose output then has the bytes of an undisturbed one, with nothing beside it
half_outputs    rounds in which a command that writes its output at once left a part of it
orphans         rounds in which a process was alive 5 s after the command
"""

import hashlib
import json
import os
import random
import shutil
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import psutil
from jsonargparse import Namespace
from support.command_faults import kill_commands
from support.corpus import write_text_shards
from support.report import make_parser, write

sys.path.append(str(Path(__file__).resolve().parents[2]))

from megabert.files import checkpoint_format as layout
from tests.helpers.ports import free_port

REPOSITORY = Path(__file__).resolve().parents[2]
STEPS, SAVE_EVERY, STEP_BINS = 20, 4, 2
RECIPE = [
    "--model.num_hidden_layers=2", "--model.hidden_size=32", "--model.num_attention_heads=2",
    "--model.intermediate_size=48", "--data.max_seq_len=32", "--data.micro_batch_tokens=256",
    f"--data.global_batch_tokens={256 * STEP_BINS}", "--data.num_workers=0", "--run.eval_tokens=512",
    "--run.log_every_steps=1", "--run.ops=torch", f"--run.max_steps={STEPS}", f"--run.save_every_steps={SAVE_EVERY}",
]  # fmt: skip
# For a start to reach the moment of its fault, and for processes to end.
TIMEOUT_S = 120.0
KILLS = ("kill rank", "kill rank in saving", "kill launcher", "kill launcher in saving")
FAULTS = (*KILLS, "damaged checkpoint", "full disk", "read-only folder")
WEIGHTS = (2, 4, 1, 2, 3, 2, 2)
MOUNTS = os.geteuid() == 0


class Started(NamedTuple):
    process: subprocess.Popen
    log: Path


class Round:
    """One run with its fault and its restarts, in a folder of its own."""

    def __init__(self, folder: Path, tokens: Path, ds_config: Path, fault: str, ranks: int, rng: random.Random):
        self.folder, self.tokens, self.ds_config = folder, tokens, ds_config
        self.fault, self.ranks, self.rng = fault, ranks, rng
        self.checkpoints = folder / "run/checkpoints"
        self.starts = 0
        self.moment = ""
        self.checkpoints.mkdir(parents=True)

    def start(self, max_file_bytes: int | None = None) -> Started:
        """Start the user's command, with its output in a file."""
        env = os.environ | {
            "DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1", "WITNESS": str(self.folder / f"{self.starts}"),
            "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
        }  # fmt: skip
        launcher = [sys.executable]
        if self.ranks > 1:
            launcher = ["deepspeed", "--num_gpus", str(self.ranks), "--master_port", str(free_port())]
        command = [*launcher, "tests/helpers/scripts/witness.py", f"--ds_config={self.ds_config}"]
        command += [f"--data.train={self.tokens}", f"--run.output_dir={self.folder / 'run'}", *RECIPE]
        log = self.folder / f"log-{self.starts}.txt"
        self.starts += 1
        with open(log, "w") as file:
            process = subprocess.Popen(
                command, cwd=REPOSITORY, env=env, stdout=file, stderr=subprocess.STDOUT, start_new_session=True
            )
        # At once, so that its children inherit the limit.
        if max_file_bytes is not None:
            psutil.Process(process.pid).rlimit(psutil.RLIMIT_FSIZE, (max_file_bytes, max_file_bytes))
        return Started(process, log)

    def wait_for(self, started: Started, condition: Callable[[], bool]) -> None:
        """Wait until the condition holds or the run has ended."""
        until = time.monotonic() + TIMEOUT_S
        while not condition() and started.process.poll() is None:
            if time.monotonic() > until:
                raise RuntimeError(f"{started.log}: nothing for {TIMEOUT_S:.0f} s")
            time.sleep(0.0005)

    def wait_for_step(self, started: Started, step: int) -> None:
        """Wait until a rank has recorded this step, and a random moment longer."""
        self.wait_for(started, lambda: steps_begun(self.folder, self.starts - 1) >= step)
        time.sleep(self.rng.uniform(0, 0.06))

    def wait_for_save(self, started: Started, step: int) -> None:
        """Wait until the checkpoint of this step is being written, and a random moment longer."""
        temporary = self.checkpoints / f"{layout.TEMPORARY}{layout.tag_of(step)}"
        self.wait_for(started, temporary.exists)
        time.sleep(self.rng.uniform(0, 0.04))

    def strike(self) -> None:
        """Start the run and cause the fault; returns when all its processes have ended."""
        if self.fault in KILLS:
            self.kill()
        elif self.fault == "damaged checkpoint":
            self.damage()
        elif self.fault == "full disk":
            self.fill_disk()
        else:
            self.forbid_writing()

    def kill(self, least: int = 1) -> None:
        """Kill (-9) a rank, or one of the launcher's two processes."""
        started = self.start()
        if "saving" in self.fault:
            step = self.rng.randrange(SAVE_EVERY, STEPS + 1, SAVE_EVERY)
            self.wait_for_save(started, step)
        else:
            step = self.rng.randint(least, STEPS)
            self.wait_for_step(started, step)
        ranks, launchers = family(started.process)
        victim = self.rng.choice(launchers if "launcher" in self.fault and launchers else ranks) if ranks else None
        if victim is not None and victim.is_running():
            victim.kill()
        self.moment = f"step {step}"
        end_of([*ranks, *launchers], started)

    def damage(self) -> None:
        """Flip a bit, cut off the end of a file or delete it, in the newest of at least two checkpoints."""
        self.kill(least=3 * SAVE_EVERY)
        tag = layout.list_tags(self.checkpoints)[0]
        file = self.checkpoints / tag / self.rng.choice(layout.files_of(self.checkpoints / tag))
        data = bytearray(file.read_bytes())
        how = self.rng.choice(("bit", "end", "file"))
        if how == "bit":
            data[self.rng.randrange(len(data))] ^= 1 << self.rng.randrange(8)
        file.write_bytes(data[: self.rng.randrange(len(data))] if how == "end" else data)
        if how == "file":
            file.unlink()
        self.moment += f", a {how} of {file.name} of {tag}"

    def fill_disk(self) -> None:
        """Leave space for one or two checkpoints, or fill the disk while one is written."""
        if not MOUNTS:
            # Less than a shard of the optimizer state.
            self.expect_refusal(self.start(max_file_bytes=300_000))
            self.moment = "files limited to 300 kB"
            return
        size = int(CHECKPOINT_BYTES * self.rng.uniform(1.0, 2.9))
        filled = self.rng.random() < 0.5
        self.mount(f"size={16 * CHECKPOINT_BYTES if filled else size}")
        started = self.start()
        if filled:
            step = self.rng.randrange(SAVE_EVERY, STEPS + 1, SAVE_EVERY)
            self.wait_for_save(started, step)
            fill(self.checkpoints / "filler")
            self.moment = f"filled while step {step} was written"
        else:
            self.moment = f"{size:,} bytes"
        self.expect_refusal(started, may_end=filled)
        (self.checkpoints / "filler").unlink(missing_ok=True)
        self.remount(f"size={16 * CHECKPOINT_BYTES}")

    def forbid_writing(self) -> None:
        """Make the folder read-only from a random step on; root ignores permissions, but not a mount."""
        if MOUNTS:
            self.mount(f"size={16 * CHECKPOINT_BYTES}")
        started = self.start()
        step = self.rng.randint(1, STEPS - SAVE_EVERY)
        self.wait_for_step(started, step)
        # The mount is busy while a checkpoint is written.
        for _ in range(1000):
            if self.remount("ro") == 0:
                break
            time.sleep(0.001)
        self.moment = f"step {step}"
        self.expect_refusal(started, may_end=True)
        self.remount("rw")

    def mount(self, options: str) -> None:
        subprocess.run(["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(self.checkpoints)], check=True)

    def remount(self, options: str) -> int:
        if not MOUNTS:
            self.checkpoints.chmod(0o555 if options == "ro" else 0o755)
            return 0
        command = ["mount", "-o", f"remount,{options}", str(self.checkpoints)]
        return subprocess.run(command, check=False, stderr=subprocess.DEVNULL).returncode

    def expect_refusal(self, started: Started, may_end: bool = False) -> None:
        """Wait until the run fails with a message that names the folder. may_end: it may also have succeeded."""
        ranks, launchers = family(started.process)
        code = started.process.wait(TIMEOUT_S)
        end_of([*ranks, *launchers], started)
        explained = any(
            "could not be written" in line and str(self.checkpoints) in line
            for line in started.log.open(errors="replace")
        )
        if not (code != 0 and explained) and not (may_end and code == 0):
            raise RuntimeError(
                f"{started.log}: exit code {code}, and {'a' if explained else 'no'} message about the checkpoint"
            )
        self.moment += ", refused" if code else ", after the last save"

    def finish(self) -> None:
        """Start the run again with the same command until it succeeds."""
        for _ in range(3):
            started = self.start()
            code = started.process.wait(TIMEOUT_S)
            if code == 0:
                break
        else:
            raise RuntimeError(f"{started.log}: did not succeed in three more starts, exit code {code}")
        if self.fault == "damaged checkpoint" and "is damaged and not used" not in started.log.read_text():
            raise RuntimeError(f"{started.log}: the damage was not noticed")

    def weights(self) -> str:
        """Return a hash of the final weights."""
        from megabert.convert.deepspeed_checkpoint import read_checkpoint

        weights, _, state = read_checkpoint(self.folder / "run")
        assert state.step == STEPS, f"the last checkpoint is of step {state.step}"
        digest = hashlib.sha256()
        for name in sorted(weights):
            digest.update(name.encode() + weights[name].numpy().tobytes())
        return digest.hexdigest()

    def lost_samples(self) -> int:
        """Count the bins that were missed or trained on twice; steps that a later start did again count once."""
        bins_of: dict[int, list[int]] = {}
        for start in range(self.starts):
            of_start: dict[int, list[int]] = {}
            for path in self.folder.glob(f"{start}-*.jsonl"):
                for line in path.read_text().split("\n")[:-1]:
                    step = json.loads(line)
                    of_start.setdefault(step["step"], []).extend(step["bins"])
            if of_start:
                earlier = {step: bins for step, bins in bins_of.items() if step < min(of_start)}
                bins_of = earlier | of_start
        trained = Counter(index for bins in bins_of.values() for index in bins)
        return sum(abs(trained[index] - 1) for index in {*trained, *range(STEPS * STEP_BINS)})

    def close(self) -> None:
        if MOUNTS and os.path.ismount(self.checkpoints):
            subprocess.run(["umount", str(self.checkpoints)], check=True)


# Set by the first undisturbed run.
CHECKPOINT_BYTES = 0


def steps_begun(folder: Path, start: int) -> int:
    """Return the last step that any rank has recorded."""
    last = 0
    for path in folder.glob(f"{start}-*.jsonl"):
        lines = path.read_text().split("\n")[:-1]
        last = max(last, json.loads(lines[-1])["step"] if lines else 0)
    return last


def family(process: subprocess.Popen) -> tuple[list[psutil.Process], list[psutil.Process]]:
    """Return the run's ranks and its launcher's processes."""
    try:
        top = psutil.Process(process.pid)
        members = [top, *top.children(recursive=True)]
        words = {member: member.cmdline() for member in members}
    except psutil.NoSuchProcess:
        return [], []
    if "tests/helpers/scripts/witness.py" in words[top][:3]:
        return [top], []
    ranks = [member for member in members if any(word.startswith("--local_rank=") for word in words[member])]
    ranks = [member for member in ranks if "deepspeed.launcher.launch" not in words[member]]
    return ranks, [member for member in members if member not in ranks]


def end_of(processes: list[psutil.Process], started: Started) -> None:
    """Wait until all have ended: two runs must not write to one folder."""
    started.process.wait(TIMEOUT_S)
    _, alive = psutil.wait_procs(processes, timeout=TIMEOUT_S)
    for process in alive:
        process.kill()
    if alive:
        raise RuntimeError(f"{started.log}: processes were left after {TIMEOUT_S:.0f} s: {alive}")


def fill(path: Path) -> None:
    """Fill the disk."""
    with open(path, "wb", buffering=0) as file:
        try:
            while file.write(bytes(65_536)):
                pass
        except OSError:
            pass


def undisturbed(base: Path, tokens: Path, ds_config: Path, ranks: int) -> str:
    """Return the weights' hash of a run without a fault; sums have another order on more ranks."""
    global CHECKPOINT_BYTES
    run = Round(base / f"undisturbed-{ranks}", tokens, ds_config, "none", ranks, random.Random(0))
    run.finish()
    assert run.lost_samples() == 0, "an undisturbed run loses no bins"
    newest = run.checkpoints / layout.list_tags(run.checkpoints)[0]
    CHECKPOINT_BYTES = max(CHECKPOINT_BYTES, sum(path.stat().st_size for path in newest.iterdir()))
    return run.weights()


def plan(seed: int, rounds: int) -> Iterator[tuple[str, int, random.Random]]:
    """Yield each round's fault, number of ranks, and random generator."""
    rng = random.Random(seed)
    for _ in range(rounds):
        [fault] = rng.choices(FAULTS, WEIGHTS)
        yield fault, 2 if "launcher" in fault else rng.choice((1, 1, 1, 2)), random.Random(rng.random())


def read_arguments() -> Namespace:
    parser = make_parser(__doc__ or "", quick="one round, or one of each command: within 50 s on two cores")
    parser.add_argument("--rounds", type=int, default=25)
    parser.add_argument("--commands", action="store_true", help="kill the commands around pretraining instead")
    parser.add_argument("--seed", type=int, default=1)
    return parser.parse_args()


def main() -> int:
    options = read_arguments()
    base = Path(tempfile.mkdtemp(prefix="fault-injection-"))
    if options.commands:
        return kill_commands(base, options.seed, None if options.quick else options.rounds, options.json)
    config = json.loads((REPOSITORY / "ds_configs/zero2.json").read_text())
    config["torch_autocast"]["enabled"] = False
    ds_config = base / "zero2.json"
    ds_config.write_text(json.dumps(config))
    tokens = write_text_shards(base)
    expected: dict[int, str] = {}
    print(
        f"full disks and read-only folders by {'a tmpfs' if MOUNTS else 'ulimit -f and permissions: not root'}",
        flush=True,
    )
    identical = lost = 0
    num_faults: Counter[str] = Counter()
    for number, (fault, ranks, rng) in enumerate(plan(options.seed, 1 if options.quick else options.rounds), 1):
        if ranks not in expected:
            expected[ranks] = undisturbed(base, tokens, ds_config, ranks)
        run = Round(base / f"round-{number}", tokens, ds_config, fault, ranks, rng)
        started_at = time.monotonic()
        try:
            run.strike()
            run.finish()
            same, missed = run.weights() == expected[ranks], run.lost_samples()
        except (RuntimeError, ValueError, subprocess.TimeoutExpired) as error:
            print(error, flush=True)
            same, missed = False, 0
        finally:
            run.close()
        identical, lost = identical + same, lost + missed
        num_faults[fault] += 1
        print(
            f"round {number}: {ranks} rank{'s' if ranks > 1 else ''}, {fault} ({run.moment}), {run.starts} starts, "
            f"{time.monotonic() - started_at:.0f} s: {'identical' if same else 'NOT IDENTICAL'}, {missed} bins lost",
            flush=True,
        )
        if same and not missed:
            shutil.rmtree(run.folder)
    print(", ".join(f"{count} x {fault}" for fault, count in num_faults.most_common()))
    rounds = num_faults.total()
    print(f"{rounds} rounds, {identical} identical, {lost} samples lost")
    write({"rounds": rounds, "identical": identical, "lost_samples": lost}, options.json)
    good = identical == rounds and lost == 0
    if good:
        shutil.rmtree(base)
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
