"""Joining the process group: a port that is taken, and a limit of open files that is too low, are one line."""

import resource
import socket

import pytest

from megabert.process.exit_codes import EXIT_PEER_LOST
from megabert.process.open_files import allow_open_files
from megabert.training.distributed import process
from megabert.training.distributed.watchdog import RankLostError
from tests.helpers.runs import Corpus, finish_ranks, patched, pretrain_command, run_command, start_ranks


def test_a_taken_port_is_named_with_the_remedy(monkeypatch):
    with socket.create_server(("127.0.0.1", 0)) as other:
        monkeypatch.setenv("MASTER_PORT", str(other.getsockname()[1]))
        with pytest.raises(RankLostError, match=r"port \d+, .* Address already in use.*--master_port PORT") as error:
            process.open_store(0, 2)
    assert "\n" not in str(error.value)


def test_a_limit_of_open_files_is_raised_or_named(monkeypatch):
    asked = []
    monkeypatch.setattr(resource, "getrlimit", lambda _: (40, 4096))
    monkeypatch.setattr(resource, "setrlimit", lambda _, limits: asked.append(limits))
    allow_open_files(132)
    assert asked == [(4096, 4096)]
    monkeypatch.setattr(resource, "getrlimit", lambda _: (40, 40))
    with pytest.raises(ValueError, match=r"only 40 files here .* expected at least 132\. .*ulimit -n 4096"):
        allow_open_files(132)


def test_a_run_with_too_few_open_files_ends_with_one_line(corpus: Corpus, tmp_path):
    command = patched(pretrain_command(corpus, tmp_path, "--run.max_steps=2", "--data.num_workers=2"))
    done = run_command(command, PATCH="import resource; resource.setrlimit(resource.RLIMIT_NOFILE, (40, 40))")
    assert done.code == 2
    assert len(done.output.splitlines()) == 1
    assert "a process may open only 40 files here" in done.output


def test_two_runs_at_one_port_do_not_wait_for_each_other(corpus: Corpus, tmp_path):
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = str(other.getsockname()[1])
        [rank0] = start_ranks(pretrain_command(corpus, tmp_path), 1, WORLD_SIZE="2", MASTER_PORT=port)
        done = finish_ranks([rank0], timeout_s=60)
    assert done.code == EXIT_PEER_LOST
    assert f"port {port}, where the ranks of this run meet, cannot be used" in done.output.splitlines()[-1]
