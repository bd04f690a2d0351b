"""launch/slurm/pretrain.sbatch with fake srun and scontrol; tests/cluster/test_slurm.py runs it on a real SLURM."""

import os
import subprocess
from pathlib import Path

import pytest

from tests.helpers.runs import REPOSITORY

SCRIPT = REPOSITORY / "launch/slurm/pretrain.sbatch"


@pytest.fixture
def attempt(tmp_path: Path):
    """Run one attempt of a job whose srun is a script; returns exit code, what was printed, and srun's arguments."""
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin/activate").write_text(f'PATH="{tmp_path}/bin:$PATH"\n')
    programs = {
        "srun": f'printf "%s\\n" "$@" > {tmp_path}/words\neval "$RANKS"',
        "sinfo": '[ -z "${ABLE:-}" ] || printf "%s\\n" $ABLE',
        "scontrol": 'case $* in "show hostnames node-["*) printf "node-%s\\n" 1 2 3 ;; '
        '"show hostnames"*) echo "$3" | tr , "\\n" ;; '
        '"show -o job"*) echo "A=1 ExcNodeList=node-9 B=2" ;; *) echo "scontrol $*" ;; esac',
    }
    for name, script in programs.items():
        (tmp_path / "bin" / name).write_text(f"#!/usr/bin/env bash\n{script}\n")
        (tmp_path / "bin" / name).chmod(0o755)
    slurm = {"SLURM_JOB_ID": "7", "SLURM_JOB_NODELIST": "node-[1-3]", "SLURM_NTASKS": "6"}

    def run(restarts: int, ranks: str, *flags: str, **variables: str) -> tuple[int, str, list[str]]:
        env = {"PATH": os.environ["PATH"], "VENV": str(tmp_path), "OUT": str(tmp_path / "out"), "RANKS": ranks}
        env |= slurm | {"SLURM_RESTART_COUNT": str(restarts), "MAX_CRASHES": "1"} | variables
        done = subprocess.run(
            ["bash", str(SCRIPT), *flags], cwd=REPOSITORY, env=env, text=True, check=False,
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        )  # fmt: skip
        return done.returncode, done.stdout, (tmp_path / "words").read_text().splitlines()

    return run


def test_every_line_for_sbatch_is_an_option():
    lines = SCRIPT.read_text().splitlines()
    options = [line for line in lines if line.startswith("#SBATCH")]
    assert all(line.split()[1].startswith("--") for line in options)
    code = next(number for number, line in enumerate(lines) if line and not line.startswith("#"))
    assert all(lines.index(line) < code for line in options), "sbatch reads none after the first command"


def test_a_finished_run_and_an_error_of_the_user_end_the_job(attempt):
    for code in (0, 2):
        ended, printed, _ = attempt(0, f"exit {code}")
        assert ended == code
        assert "requeue" not in printed


def test_a_stopped_run_is_queued_again(attempt):
    ended, printed, _ = attempt(0, "exit 85")
    assert ended == 0
    assert "stopped and saved: queueing again\nscontrol requeue 7" in printed


def test_crashes_are_counted_over_attempts_until_there_is_a_new_checkpoint(attempt, tmp_path):
    (tmp_path / "out/checkpoints").mkdir(parents=True)
    save = f"echo step-2 > {tmp_path}/out/checkpoints/latest; exit 9"
    ended = [attempt(0, "exit 9"), attempt(1, save), attempt(2, "exit 9")]
    assert [code for code, _, _ in ended] == [0, 0, 9]
    assert "crash 1 since checkpoint none\nscontrol requeue 7" in ended[0][1]
    assert "crash 1 since checkpoint step-2\nscontrol requeue 7" in ended[1][1]
    assert "crash 2 since checkpoint step-2" in ended[2][1]
    assert "requeue" not in ended[2][1]


def test_later_attempts_resume_from_the_jobs_own_checkpoint(attempt, tmp_path):
    (tmp_path / "out/checkpoints").mkdir(parents=True)
    (tmp_path / "out/logs").mkdir()
    user = ["--run.resume", "none", "--run.max_steps=5"]
    *_, words = attempt(0, f"echo step-2 > {tmp_path}/out/checkpoints/latest; exit 85", *user)
    assert words[-3:] == user
    assert words[words.index("--run.output_dir") + 1] == str(tmp_path / "out")
    os.utime(tmp_path / "out/logs/7-started", (0, 0))
    *_, words = attempt(1, "exit 0", *user)
    assert words[-3:] == ["--run.max_steps=5", "--run.resume", "auto"]
    assert words.count("--run.resume") == 1


CRASH_ON_2 = "echo 'rank 1 on node-2 is gone: killed; ending rank 0 on node-1' > $OUT/logs/7-rank0.log; exit 86"


def option(words: list[str], name: str) -> str:
    [value] = [word.partition("=")[2] for word in words if word.startswith(f"--{name}=")]
    return value


def test_all_nodes_are_used_and_the_host_of_a_crash_is_left_out_of_the_next_attempt(attempt):
    ended, printed, words = attempt(0, CRASH_ON_2)
    assert [option(words, name) for name in ("nodes", "ntasks", "nodelist")] == ["3", "6", "node-1,node-2,node-3"]
    assert ended == 0
    assert "crash 1 since checkpoint none, on node-2\n" in printed
    assert printed.endswith("scontrol requeue 7\nscontrol update jobid=7 excnodelist=node-9,node-2\n")


@pytest.mark.parametrize(
    ("more", "end"),
    [
        ("", "node-2 is used again: without it only 2 of the 3 nodes that the job needs are left\n"),
        ("node-4", "scontrol update jobid=7 excnodelist=node-9,node-2\n"),
    ],
)
def test_the_host_of_a_crash_is_used_again_where_the_partition_has_no_other(attempt, more, end):
    """A job that leaves it out would wait for ever. node-9 is left out by the user."""
    _, printed, _ = attempt(0, CRASH_ON_2, ABLE=f"node-1 node-2 node-3 node-9 {more}")
    assert printed.endswith(end)
    assert ("excnodelist" in printed) == bool(more)


def test_a_spare_node_replaces_the_one_that_crashed_inside_the_job(attempt, tmp_path):
    once = f"[ -e $OUT/again ] && exit 0; touch $OUT/again; {CRASH_ON_2}"
    ended, printed, words = attempt(0, once, SPARES="1")
    assert [option(words, name) for name in ("nodes", "ntasks", "nodelist")] == ["2", "4", "node-1,node-3"]
    assert (ended, "requeue" in printed) == (0, False)
    assert "attempt 1 of job 7: 4 ranks on node-1 node-2" in printed
    assert "attempt 2 of job 7: 4 ranks on node-1 node-3, meeting at node-1" in printed
    _, printed, _ = attempt(1, "exit 85", SPARES="1")
    assert "4 ranks on node-1 node-3" in printed, "a later attempt knows it too"


@pytest.mark.parametrize("code", ["74", "75"])
def test_a_disk_or_a_store_that_stays_away_blames_no_host(attempt, code):
    _, printed, _ = attempt(0, CRASH_ON_2.replace("86", code), SPARES="1")
    assert printed.endswith("scontrol requeue 7\n")
    assert "node-3" not in printed


def test_too_many_spares_are_an_error(attempt, tmp_path):
    (tmp_path / "words").touch()
    ended, printed, _ = attempt(0, "exit 0", SPARES="3")
    assert (ended, printed) == (2, "SPARES=3, expected fewer than the 3 nodes\n")


def test_the_folder_of_the_logs_is_no_pattern_of_srun(attempt, tmp_path):
    _, _, words = attempt(0, "exit 0", OUT=str(tmp_path / "c%s"))
    assert f"--output={tmp_path}/c%%s/logs/7-rank%t.log" in words
    assert (tmp_path / "c%s/logs").is_dir()


def test_an_output_in_a_store_is_an_error_before_any_folder(attempt, tmp_path):
    (tmp_path / "words").touch()
    ended, printed, _ = attempt(0, "exit 0", OUT="s3://bucket/run")
    assert (ended, printed) == (
        2,
        "OUT is 's3://bucket/run', expected a path on a disk or a mounted file system\n",
    )
    assert not (tmp_path / "s3:").exists()


def test_hooks_for_modules_and_containers(attempt, tmp_path):
    """The container is a program that stands for apptainer: it runs its command."""
    (tmp_path / "bin/container").write_text('#!/usr/bin/env bash\necho "in $2 with $MODULE"; exec "${@:3}"\n')
    (tmp_path / "bin/container").chmod(0o755)
    arguments = {
        "SRUN_ARGS": "--mem=0 container exec image.sif",
        "PROLOGUE": f"export MODULE=cuda PATH={tmp_path}/bin:$PATH",
    }
    first = f"words=$(sed -n '/^container$/,$p' {tmp_path}/words | sed '4,$d'); $words echo trained"
    ended, printed, words = attempt(0, first, VENV="", **arguments)
    assert ended == 0
    assert "in image.sif with cuda\ntrained" in printed
    assert words[words.index("--mem=0") :][:6] == ["--mem=0", "container", "exec", "image.sif", "python", "-u"]
