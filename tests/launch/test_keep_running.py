"""launch/keep_running.sh restarts after crashes, never twice in one folder, and gives up on a run that cannot work."""

import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
import torch

from megabert.convert.deepspeed_checkpoint import read_checkpoint
from megabert.files.checkpoint_format import MANIFEST
from megabert.training.telemetry.reporter import read_metrics
from tests.helpers.ports import free_port
from tests.helpers.runs import REPOSITORY, Corpus, pretrain_command, run_ranks

SETTINGS = ["--run.max_steps=60", "--run.save_every_steps=5", "--run.eval_every_steps=60"]


def keep_running(corpus: Corpus, out: Path, log: Path, *more: str, ranks: int) -> subprocess.Popen:
    flags = [flag for flag in pretrain_command(corpus, out, *more)[2:] if not flag.startswith("--run.output_dir")]
    variables = {"OUT": str(out), "DEEPSPEED": f"--num_gpus {ranks} --master_port {free_port()}"}
    fixed = {"DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1"}
    with open(log, "w") as file:
        command = ["bash", "launch/keep_running.sh", *flags]
        return subprocess.Popen(command, cwd=REPOSITORY, env=os.environ | fixed | variables, stdout=file, stderr=file)


def wait_for(what: str, condition, log: Path, seconds: float = 120) -> None:
    until = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < until, f"{what} never came\n{log.read_text()}"
        time.sleep(0.05)


def alive(process: psutil.Process) -> bool:
    """Return False for a zombie: some containers have no init that collects orphans."""
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def last_step(out: Path) -> int:
    records = read_metrics(out / "metrics.jsonl")
    return records[-1]["step"] if records else 0


@pytest.mark.nightly
@pytest.mark.parametrize("victims", [["launcher"], ["rank", "launcher"]], ids="-".join)
def test_a_run_that_is_killed_and_restarted_ends_bitwise_as_if_undisturbed(corpus: Corpus, tmp_path, victims):
    out, log = tmp_path / "disturbed", tmp_path / "log"
    ranks = 2 if "rank" in victims else 1
    process = keep_running(corpus, out, log, *SETTINGS, ranks=ranks)
    try:
        for killed in victims:
            reached = last_step(out)
            wait_for("more steps", lambda reached=reached: last_step(out) >= reached + 6, log)
            # It is written while the next steps run.
            wait_for("a checkpoint", lambda: any(out.glob(f"checkpoints/step-*/{MANIFEST}")), log)
            [deepspeed] = psutil.Process(process.pid).children()
            [launcher] = deepspeed.children()
            victim = launcher if killed == "launcher" else launcher.children()[1]
            everyone = psutil.Process(process.pid).children(recursive=True)
            os.kill(victim.pid, signal.SIGKILL)
            wait_for("the end of all processes", lambda everyone=everyone: not any(map(alive, everyone)), log)
        assert process.wait(120) == 0, log.read_text()
    finally:
        for child in psutil.Process(process.pid).children(recursive=True) if process.poll() is None else []:
            child.kill()
        process.kill()
    assert log.read_text().count("starting again from checkpoint step-") == len(victims)
    done = run_ranks(corpus, tmp_path / "whole", *SETTINGS, ranks=ranks)
    assert done.code == 0, done.output
    first, second = (read_checkpoint(folder)[0] for folder in (tmp_path / "whole", out))
    assert all(torch.equal(first[name], second[name]) for name in first)


def fake_deepspeed(folder: Path, monkeypatch, script: str) -> None:
    """Make a repository whose deepspeed is a script."""
    (folder / "launch/shared").mkdir(parents=True)
    for name in ("keep_running.sh", "shared/restart_policy.sh", "common.sh"):
        shutil.copy(REPOSITORY / "launch" / name, folder / "launch" / name)
    (folder / "bin").mkdir()
    (folder / "bin/deepspeed").write_text(f"#!/usr/bin/env bash\necho $@ >> {folder}/starts\n{script}\n")
    (folder / "bin/deepspeed").chmod(0o755)
    monkeypatch.setenv("PATH", f"{folder / 'bin'}:{os.environ['PATH']}")


def running(folder: Path) -> subprocess.Popen:
    """Start keep_running.sh with the fake deepspeed, and wait until that has started."""
    env = os.environ | {"OUT": str(folder / "out")}
    process = subprocess.Popen(["bash", str(folder / "launch/keep_running.sh")], env=env)
    wait_for("start", (folder / "starts").exists, folder / "starts")
    return process


def attempts(folder: Path, *flags: str, **variables: str) -> tuple[int, int]:
    """(exit code, number of starts)."""
    env = os.environ | {"OUT": str(folder / "out")} | variables
    done = subprocess.run(["bash", str(folder / "launch/keep_running.sh"), *flags], env=env, check=False, timeout=300)
    return done.returncode, len((folder / "starts").read_text().splitlines())


def test_it_gives_up_after_crashes_without_a_new_checkpoint(tmp_path, monkeypatch):
    fake_deepspeed(tmp_path, monkeypatch, "exit 137")
    assert attempts(tmp_path, MAX_CRASHES="2") == (137, 3)


def test_it_runs_in_its_own_checkout_whatever_the_shell_calls_paths(tmp_path, monkeypatch):
    """CDPATH leads `cd launch/..` to another folder, unless the script is named by its path from the root."""
    (tmp_path / "other/launch").mkdir(parents=True)
    fake_deepspeed(tmp_path / "own", monkeypatch, "exit 2")
    monkeypatch.chdir(tmp_path / "own")
    env = os.environ | {"CDPATH": str(tmp_path / "other")}
    for out, code, message in (
        ("a[1] %s", 2, ""),
        ("-i", 2, "OUT is '-i', which begins with a dash. Write it as ./-i"),
    ):
        done = subprocess.run(
            ["bash", "launch/keep_running.sh"], env=env | {"OUT": out}, check=False, timeout=300,
            stderr=subprocess.PIPE, text=True,
        )  # fmt: skip
        assert (done.returncode, done.stderr.strip()) == (code, message)
    assert (tmp_path / "own/a[1] %s/.started").exists()


def test_ranks_of_a_killed_launcher_end_before_the_next_start(tmp_path, monkeypatch):
    """They save meanwhile. `deepspeed` exits with 0 when its launcher is killed, which is no end of the run."""
    saved = tmp_path / "saved"
    second = f"if [ $(wc -l < {tmp_path}/starts) = 2 ]; then [ -e {saved} ] || exit 2; exit 0; fi"
    fake_deepspeed(tmp_path, monkeypatch, f"{second}\n(sleep 0.5; touch {saved}) &\nexit 0")
    assert attempts(tmp_path) == (0, 2)


def test_an_error_of_the_user_is_not_retried(tmp_path, monkeypatch):
    fake_deepspeed(tmp_path, monkeypatch, "exit 2")
    assert attempts(tmp_path) == (2, 1)


def test_a_new_checkpoint_resets_the_count_and_a_stop_is_no_crash(tmp_path, monkeypatch):
    (tmp_path / "out/checkpoints").mkdir(parents=True)
    latest = tmp_path / "out/checkpoints/latest"
    script = (
        f"case $(wc -l < {tmp_path}/starts) in 1) exit 86;; 2) echo step-2 > {latest}; exit 86;; [345]) exit 85;; esac"
    )
    fake_deepspeed(tmp_path, monkeypatch, script)
    assert attempts(tmp_path, MAX_CRASHES="1") == (0, 6)


def test_the_users_resume_holds_until_this_command_has_a_checkpoint(tmp_path, monkeypatch):
    latest = tmp_path / "out/checkpoints/latest"
    latest.parent.mkdir(parents=True)
    # Of an earlier run.
    latest.write_text("step-9")
    os.utime(latest, (1, 1))
    script = f"case $(wc -l < {tmp_path}/starts) in 1) exit 86;; 2) echo step-2 > {latest}; exit 85;; esac"
    fake_deepspeed(tmp_path, monkeypatch, script)
    assert attempts(tmp_path, "--run.resume", "none") == (0, 3)
    begins = [line.split("--run.resume")[1:] for line in (tmp_path / "starts").read_text().splitlines()]
    assert begins == [[" none"], [" none"], [" auto"]]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP, signal.SIGUSR2, signal.SIGINT])
def test_a_signal_stops_it_after_the_ranks_have_saved(tmp_path, monkeypatch, number):
    script = tmp_path / "rank.py"
    script.write_text(
        "import pathlib, signal, sys, time\n"
        f"folder = pathlib.Path({str(tmp_path)!r})\n"
        "def stop(*_):\n    (folder / 'saved').touch()\n    sys.exit(85)\n"
        "signal.signal(signal.SIGTERM, stop)\n(folder / 'up').touch()\ntime.sleep(600)\n"
    )
    launcher = f"import subprocess, sys; sys.exit(subprocess.run([sys.executable, {str(script)!r}]).returncode)"
    fake_deepspeed(tmp_path, monkeypatch, f"{sys.executable} -c '{launcher.replace(chr(39), chr(34))}'")
    process = running(tmp_path)
    wait_for("the rank", (tmp_path / "up").exists, tmp_path / "starts")
    everyone = psutil.Process(process.pid).children(recursive=True)
    process.send_signal(number)
    assert process.wait(30) == 85
    assert (tmp_path / "saved").exists()
    assert not any(map(alive, everyone))
    assert len((tmp_path / "starts").read_text().splitlines()) == 1


def test_the_exit_code_is_the_commands_if_it_ends_while_the_signal_is_handled(tmp_path):
    script = (
        "source launch/common.sh; trap 'kill -TERM $group; sleep 1' USR1; "
        f"start_group bash -c 'trap \"exit 85\" TERM; touch {tmp_path}/up; while true; do sleep 0.1; done'; "
        "wait_for_group; exit $code"
    )
    process = subprocess.Popen(["bash", "-euc", script], cwd=REPOSITORY)
    wait_for("the command", (tmp_path / "up").exists, tmp_path / "up")
    process.send_signal(signal.SIGUSR1)
    assert process.wait(30) == 85


def test_a_second_ctrl_c_ends_ranks_that_do_not_save(tmp_path, monkeypatch):
    program = "import pathlib, signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); "
    program += f'pathlib.Path("{tmp_path}/up").touch(); time.sleep(600)'
    fake_deepspeed(tmp_path, monkeypatch, f"{sys.executable} -c '{program}'")
    process = running(tmp_path)
    wait_for("the rank", (tmp_path / "up").exists, tmp_path / "starts")
    everyone = psutil.Process(process.pid).children(recursive=True)
    # Repeated, because two signals that come before the shell handles the first are one.
    until = time.monotonic() + 300
    while process.poll() is None and time.monotonic() < until:
        process.send_signal(signal.SIGINT)
        time.sleep(0.5)
    assert process.wait(1) in (137, 143)
    assert not any(map(alive, everyone))


def test_the_users_resume_is_dropped_in_either_form(tmp_path, monkeypatch):
    """Started with a checkpoint of its own choice, crashed after another: the second attempt takes the new one."""
    latest = tmp_path / "out/checkpoints/latest"
    script = f"case $(wc -l < {tmp_path}/starts) in 1) mkdir -p {latest.parent}; echo step-2 > {latest}; exit 86;; esac"
    fake_deepspeed(tmp_path, monkeypatch, script)
    for flags in (["--run.resume", "X"], ["--run.resume=X"], ["--resume", "X"], ["--resume=X"]):
        for path in (latest, tmp_path / "starts", tmp_path / "out/.started"):
            path.unlink(missing_ok=True)
        assert attempts(tmp_path, "--recipe", "r", *flags, "--run.seed=3") == (0, 2)
        first, second = [line.split("--recipe r ")[1] for line in (tmp_path / "starts").read_text().splitlines()]
        assert first == " ".join([*flags, "--run.seed=3"])
        assert second == "--run.seed=3 --run.resume auto"


@pytest.mark.parametrize("redirection", [">&- 2>&-", "| head -0", "> /dev/full 2>&1"])
def test_output_that_cannot_be_written_ends_no_run(tmp_path, monkeypatch, redirection):
    script = f"echo a line 2> /dev/null || true; case $(wc -l < {tmp_path}/starts) in [12]) exit 137;; esac"
    fake_deepspeed(tmp_path, monkeypatch, script)
    shell = f"bash {tmp_path}/launch/keep_running.sh {redirection}; exit ${{PIPESTATUS[0]}}"
    env = os.environ | {"OUT": str(tmp_path / "out")}
    assert subprocess.run(["bash", "-c", shell], env=env, check=False, timeout=300).returncode == 0
    assert len((tmp_path / "starts").read_text().splitlines()) == 3


def test_an_output_in_a_store_is_an_error_before_any_start(tmp_path, monkeypatch):
    fake_deepspeed(tmp_path, monkeypatch, "exit 0")
    (tmp_path / "starts").touch()
    assert attempts(tmp_path, OUT="s3://bucket/run") == (2, 0)


def test_two_runs_on_one_machine_get_different_ports(tmp_path, monkeypatch):
    fake_deepspeed(tmp_path, monkeypatch, "exit 0")
    for variables in ({}, {}, {"DEEPSPEED": "--master_port 29501"}):
        attempts(tmp_path, **variables)
    first, second, given = [
        re.findall(r"--master_port (\d+)", line) for line in (tmp_path / "starts").read_text().splitlines()
    ]
    assert len(first) == len(second) == 1
    assert first != second
    assert given == ["29501"]
