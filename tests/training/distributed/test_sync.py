"""Start-up coordination of ranks; tests/cluster/test_hostfile.py has a folder that two machines do not share."""

import json
import os
import pickle
import sys

import pytest

from megabert.data.shards.cache import CacheOptions
from megabert.data.shards.source import open_corpus
from megabert.data.shards.storage import open_storage
from megabert.training.distributed import sync
from megabert.training.distributed.sync import LOCK_FILE, broadcast_from_rank0, check_shared_folder, lock_output_dir
from tests.helpers import warm
from tests.helpers.runs import Corpus, finish_ranks, patched, pretrain_command, run_ranks, start_ranks


def test_a_single_rank_works_without_communication(tmp_path):
    assert broadcast_from_rank0(lambda: 3, 0, 1) == 3
    check_shared_folder(tmp_path / "none", 0, 1)
    assert not (tmp_path / "none").exists()


def test_a_corpus_can_be_sent_to_another_rank(corpus: Corpus):
    whole = open_corpus([(str(corpus.tokens), 1.0)])
    copy = pickle.loads(pickle.dumps(whole))
    assert copy.fingerprint == whole.fingerprint
    assert (copy.sources[0].read_chunk(0, 0).tokens == whole.sources[0].read_chunk(0, 0).tokens).all()


@pytest.mark.parametrize("location", ["https://nowhere.invalid/c4", "pipe:cat /data/train-{000..009}.tar"])
def test_a_storage_can_be_sent_to_another_rank(location, tmp_path):
    storage, _ = open_storage(location, CacheOptions(tmp_path))
    assert pickle.loads(pickle.dumps(storage)).url("train-000.tar") == storage.url("train-000.tar")


@pytest.fixture
def holder(tmp_path):
    """Another process that has locked tmp_path."""
    program = (
        "import sys, time; from pathlib import Path; from megabert.training.distributed.sync import lock_output_dir\n"
    )
    program += "lock_output_dir(Path(sys.argv[1]), 0, 1); print('locked', flush=True); time.sleep(600)"
    process = warm.popen(
        [sys.executable, "tests/helpers/scripts/run_code.py", program, str(tmp_path)], dict(os.environ)
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "locked\n"
    yield process
    process.kill()
    process.communicate()


def test_a_folder_is_locked_until_the_process_of_its_run_ends(holder, tmp_path, monkeypatch):
    monkeypatch.setattr(sync, "LOCK_WAIT_S", 0.5)
    with pytest.raises(ValueError, match=f"process {holder.pid} on .* is training there. Stop it, or choose another"):
        lock_output_dir(tmp_path, 0, 1)
    lock_output_dir(tmp_path / "other", 0, 1)
    holder.kill()
    holder.wait()
    lock_output_dir(tmp_path, 0, 1)
    assert json.loads((tmp_path / LOCK_FILE).read_text())["pid"] == os.getpid()


def test_the_lock_of_another_machine_is_only_a_warning(holder, tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(sync, "LOCK_WAIT_S", 0.5)
    (tmp_path / LOCK_FILE).write_text('{"host": "node-7", "pid": 12}')
    lock_output_dir(tmp_path, 0, 1)
    assert "process 12 on node-7 holds the lock. Continuing" in caplog.text


def test_only_rank_0_lists_and_checks_the_shards(corpus: Corpus, tmp_path):
    """Counted by a sitecustomize.py that replaces os.stat in the ranks; strace is not installed everywhere."""
    command = patched(pretrain_command(corpus, tmp_path / "out", "--run.max_steps=1"))
    done = finish_ranks(start_ranks(command, 2, PATCH=COUNTING, COUNTED=str(tmp_path)))
    assert done.code == 0, done.output
    checked = {rank: (tmp_path / f"rank{rank}").read_text().splitlines() for rank in (0, 1)}
    shards = sum(path.suffix == ".tar" for path in corpus.tokens.iterdir())
    assert len(checked[0]) == shards
    assert checked[1] == []


COUNTING = """
import os
stat, checked = os.stat, []
def counting(path, *rest, **more):
    if str(path).endswith(".tar"):
        checked.append(str(path))
    return stat(path, *rest, **more)
os.stat = counting
exit_now = os._exit
def write_and_exit(code):
    if os.environ.get("RANK"):
        open(f"{os.environ['COUNTED']}/rank{os.environ['RANK']}", "w").write("\\n".join(checked))
    exit_now(code)
os._exit = write_and_exit
"""


ELSEWHERE = """
import os
from pathlib import Path
from megabert.training import run
from megabert.training.distributed import sync
if os.environ["RANK"] == "1":
    check = run.check_shared_folder
    run.check_shared_folder = lambda folder, *rest: check(Path(os.environ["ELSEWHERE"]), *rest)
    sync.VISIBLE_WITHIN_S = 0.2
    sync.socket.gethostname = lambda: "node-7"
"""


def test_a_folder_that_one_rank_does_not_see_is_refused_before_the_first_step(corpus: Corpus, tmp_path):
    out = tmp_path / "out"
    command = patched(pretrain_command(corpus, out, "--run.max_steps=1"))
    done = finish_ranks(start_ranks(command, 2, PATCH=ELSEWHERE, ELSEWHERE=str(tmp_path)))
    assert done.code == 2
    assert f"{out}/checkpoints: node-7 cannot read or write files that rank 0 creates there" in done.output
    assert not (out / "metrics.jsonl").exists()
    assert not list((out / "checkpoints").iterdir())


def test_an_error_on_rank_0_is_raised_on_every_rank(corpus: Corpus, tmp_path):
    """Otherwise the other ranks would wait for a message that is never sent."""
    done = run_ranks(corpus, tmp_path, "--data.train=/nowhere", "--run.max_steps=1", ranks=2)
    assert done.code == 2
    assert "/nowhere/manifest.json: no such file" in done.output
    assert "Traceback" not in done.output
