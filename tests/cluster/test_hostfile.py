"""Two machines through deepspeed --hostfile: network namespaces with a stand-in for pdsh, no ssh (namespaces.sh, pdsh)."""

import os
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
import torch

from megabert.convert.deepspeed_checkpoint import read_checkpoint
from megabert.training.distributed.watchdog import DIED
from tests.conftest import REPOSITORY, Corpus, free_port, pretrain_command, run_ranks
from tests.training.distributed.test_signals import start, wait_for_step

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
    """As a user would from the first machine; what else the ranks need stands in .deepspeed_env."""
    (folder / "hostfile").write_text(f"# two machines\n{FIRST} slots=1\n{SECOND} slots=1\n")
    (folder / "deepspeed_env").write_text("GLOO_SOCKET_IFNAME=eth0\nDS_ACCELERATOR=cpu\nOMP_NUM_THREADS=1\n")
    launcher = ["deepspeed", f"--hostfile={folder / 'hostfile'}", "--no_ssh_check", "--master_addr=10.77.0.1"]
    command = [*launcher, f"--master_port={free_port()}", *pretrain_command(corpus, out, *more)[1:]]
    variables = {
        "PATH": f"{REPOSITORY / 'tests/cluster'}:{os.environ['PATH']}",
        "DS_ENV_FILE": str(folder / "deepspeed_env"),
        "UNSHARED": unshared,
    }
    return start(command, **variables)


def processes_of(process: subprocess.Popen) -> list[psutil.Process]:
    return psutil.Process(process.pid).children(recursive=True)


def rank(number: int, everyone: list[psutil.Process]) -> psutil.Process:
    return next(p for p in everyone if "--local_rank=0" in p.cmdline() and p.environ()["RANK"] == str(number))


def test_two_machines_give_bitwise_what_one_does(corpus: Corpus, tmp_path, machines):
    process = on_both(corpus, tmp_path, tmp_path / "two", "--run.max_steps=6")
    output, _ = process.communicate(timeout=120)
    assert process.returncode == 0, output
    done = run_ranks(corpus, tmp_path / "one", "--run.max_steps=6", ranks=2)
    assert done.code == 0, done.output
    first, second = (read_checkpoint(tmp_path / name)[0] for name in ("one", "two"))
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_a_folder_that_is_not_shared_is_noticed_before_the_first_step(corpus: Corpus, tmp_path, machines):
    out = tmp_path / "out"
    out.mkdir()
    process = on_both(corpus, tmp_path, out, "--run.max_steps=6", unshared=f"{SECOND}:{out}")
    output, _ = process.communicate(timeout=120)
    assert process.returncode == 1, output
    assert f"{out}/checkpoints: {SECOND} cannot see there, or not write, what rank 0 does" in output
    assert not (out / "metrics.jsonl").exists()


@pytest.mark.parametrize("accident", ["kill", "unplug"])
def test_a_rank_or_a_machine_that_dies_ends_the_job_within_a_minute(corpus: Corpus, tmp_path, machines, accident):
    process = on_both(corpus, tmp_path, tmp_path / "out", "--run.max_steps=1000000")
    wait_for_step(process, tmp_path / "out", 3)
    everyone = processes_of(process)
    began = time.monotonic()
    if accident == "kill":
        rank(1, everyone).kill()
    else:
        subprocess.run(["ip", "link", "set", "mb-veth2", "down"], check=True)
    try:
        output, _ = process.communicate(timeout=60)
        _, alive = psutil.wait_procs(everyone, timeout=max(0, 60 - (time.monotonic() - began)))
    finally:
        subprocess.run(["ip", "link", "set", "mb-veth2", "up"], check=True)
    assert process.returncode not in (0, 1)
    assert not alive
    assert f"rank 1 on {SECOND} {DIED}; ending rank 0 on {FIRST}" in output
