"""deepspeed --hostfile on two machines, made of network namespaces and a replacement for pdsh (namespaces.sh, pdsh)."""

import os
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
import torch

from megabert.convert.deepspeed_checkpoint import read_checkpoint
from megabert.process.exit_codes import EXIT_PEER_LOST
from megabert.training.distributed.watchdog import PEER_DIED
from tests.helpers.ports import free_port
from tests.helpers.processes import start, wait_for_step
from tests.helpers.runs import REPOSITORY, Corpus, finish_ranks, patched, pretrain_command, run_ranks, start_ranks

pytestmark = pytest.mark.namespaces

FIRST, SECOND = "mb1", "mb2"


@pytest.fixture(scope="module")
def machines() -> Iterator[None]:
    script = ["bash", str(REPOSITORY / "tests/cluster/namespaces.sh")]
    subprocess.run([*script, "down"], check=True)
    try:
        subprocess.run([*script, "up"], check=True)
        yield
    finally:
        subprocess.run([*script, "down"], check=True)


def on_both(corpus: Corpus, folder: Path, out: Path, *more: str, unshared: str = "") -> subprocess.Popen:
    """Start a run on both machines as a user would from the first; .deepspeed_env has the ranks' other variables."""
    (folder / "hostfile").write_text(f"# two machines\n{FIRST} slots=1\n{SECOND} slots=1\n")
    (folder / "deepspeed_env").write_text("GLOO_SOCKET_IFNAME=eth0\nDS_ACCELERATOR=cpu\nOMP_NUM_THREADS=1\n")
    launcher = ["deepspeed", f"--hostfile={folder / 'hostfile'}", "--no_ssh_check", "--master_addr=10.77.0.1"]
    command = [*launcher, f"--master_port={free_port()}", *pretrain_command(corpus, out, *more)[1:]]
    variables = {
        "PATH": f"{REPOSITORY / 'tests/cluster'}:{os.environ['PATH']}",
        "DS_ENV_FILE": str(folder / "deepspeed_env"),
        "UNSHARED": unshared,
    }
    return start(command, **variables)  # type: ignore[return-value]


def processes_of(process: subprocess.Popen) -> list[psutil.Process]:
    return psutil.Process(process.pid).children(recursive=True)


def rank(number: int, processes: list[psutil.Process]) -> psutil.Process:
    return next(p for p in processes if "--local_rank=0" in p.cmdline() and p.environ()["RANK"] == str(number))


@pytest.mark.nightly
def test_two_machines_give_the_bits_of_one(corpus: Corpus, tmp_path, machines):
    process = on_both(corpus, tmp_path, tmp_path / "two", "--run.max_steps=6")
    output, _ = process.communicate(timeout=600)
    assert process.returncode == 0, output
    done = run_ranks(corpus, tmp_path / "one", "--run.max_steps=6", ranks=2)
    assert done.code == 0, done.output
    first, second = (read_checkpoint(tmp_path / name)[0] for name in ("one", "two"))
    assert all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.nightly
def test_a_folder_that_is_not_shared_is_refused_before_the_first_step(corpus: Corpus, tmp_path, machines):
    out = tmp_path / "out"
    out.mkdir()
    process = on_both(corpus, tmp_path, out, "--run.max_steps=6", unshared=f"{SECOND}:{out}")
    output, _ = process.communicate(timeout=600)
    assert process.returncode == 2, output
    assert f"{out}/checkpoints: {SECOND} cannot read or write files that rank 0 creates there" in output
    assert not (out / "metrics.jsonl").exists()


# Run before training: rank R goes to machine R + 1, where it has one rank's variables as under the launcher.
MOVE = """
import ctypes, os, socket
CLONE_NEWNET, CLONE_NEWUTS = 0x40000000, 0x04000000
libc, host = ctypes.CDLL(None, use_errno=True), f"mb{int(os.environ['RANK']) + 1}"
os.environ |= {"LOCAL_RANK": "0", "LOCAL_SIZE": "1", "MASTER_ADDR": "10.77.0.1", "GLOO_SOCKET_IFNAME": "eth0"}
with open(f"/var/run/netns/{host}") as namespace:
    assert libc.setns(namespace.fileno(), CLONE_NEWNET) == 0
assert libc.unshare(CLONE_NEWUTS) == 0
socket.sethostname(host)
"""


def test_a_rank_that_dies_ends_those_of_other_machines(corpus: Corpus, tmp_path, machines):
    """Without the launcher, which takes most of the time of the next test."""
    ranks = start_ranks(patched(pretrain_command(corpus, tmp_path, "--run.max_steps=1000000")), 2, PATCH=MOVE)
    wait_for_step(ranks[0], tmp_path, 3)
    ranks[1].kill()
    done = finish_ranks(ranks)
    assert ranks[0].returncode == EXIT_PEER_LOST
    assert f"rank 1 on {SECOND} {PEER_DIED}; ending rank 0 on {FIRST}" in done.output


@pytest.mark.nightly
@pytest.mark.parametrize("accident", ["kill", "unplug"])
def test_a_rank_or_a_machine_that_dies_ends_the_job(corpus: Corpus, tmp_path, machines, accident):
    """Within a minute, or three on a busy machine, where the launchers take long to end."""
    process = on_both(corpus, tmp_path, tmp_path / "out", "--run.max_steps=1000000")
    wait_for_step(process, tmp_path / "out", 3)
    processes = processes_of(process)
    failed_at = time.monotonic()
    if accident == "kill":
        rank(1, processes).kill()
    else:
        subprocess.run(["ip", "link", "set", "mb-veth2", "down"], check=True)
    try:
        output, _ = process.communicate(timeout=180)
        _, alive = psutil.wait_procs(processes, timeout=max(0, 180 - (time.monotonic() - failed_at)))
    finally:
        subprocess.run(["ip", "link", "set", "mb-veth2", "up"], check=True)
    assert process.returncode not in (0, 1)
    assert not alive
    assert f"rank 1 on {SECOND} {PEER_DIED}; ending rank 0 on {FIRST}" in output
