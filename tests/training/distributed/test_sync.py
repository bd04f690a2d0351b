"""Work done once for all ranks. Folders that machines do not share: tests/cluster/test_hostfile.py, where there are machines."""

import json
import os
import pickle
import subprocess
import sys

import pytest

from megabert.data.shards.cache import CacheOptions
from megabert.data.shards.source import open_corpus
from megabert.data.shards.storage import open_storage
from megabert.training.distributed import sync
from megabert.training.distributed.sync import CLAIM, check_shared, claim, from_rank_0
from tests.conftest import Corpus, run_ranks


def test_alone_nothing_is_asked(tmp_path):
    assert from_rank_0(lambda: 3, 0, 1) == 3
    check_shared(tmp_path / "none", 0, 1)
    assert not (tmp_path / "none").exists()


def test_a_corpus_can_be_sent_to_another_rank(corpus: Corpus):
    whole = open_corpus([(str(corpus.tokens), 1.0)])
    there = pickle.loads(pickle.dumps(whole))
    assert there.fingerprint == whole.fingerprint
    assert (there.sources[0].read_chunk(0, 0).tokens == whole.sources[0].read_chunk(0, 0).tokens).all()


@pytest.mark.parametrize("location", ["https://nowhere.invalid/c4", "pipe:cat /data/train-{000..009}.tar"])
def test_a_storage_can_be_sent_to_another_rank(location, tmp_path):
    storage, _ = open_storage(location, CacheOptions(tmp_path))
    assert pickle.loads(pickle.dumps(storage)).url("train-000.tar") == storage.url("train-000.tar")


@pytest.fixture
def holder(tmp_path):
    """Another process that has claimed tmp_path."""
    program = "import sys, time; from pathlib import Path; from megabert.training.distributed.sync import claim\n"
    program += "claim(Path(sys.argv[1]), 0, 1); print('mine', flush=True); time.sleep(600)"
    process = subprocess.Popen([sys.executable, "-c", program, str(tmp_path)], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdout.readline() == "mine\n"
    yield process
    process.kill()
    process.communicate()


def test_a_folder_belongs_to_one_run_until_its_process_ends_however_it_does(holder, tmp_path, monkeypatch):
    monkeypatch.setattr(sync, "LEAVES_S", 0.5)
    with pytest.raises(ValueError, match=f"process {holder.pid} on .* is training there. End that, or choose another"):
        claim(tmp_path, 0, 1)
    claim(tmp_path / "other", 0, 1)
    holder.kill()
    holder.wait()
    claim(tmp_path, 0, 1)
    assert json.loads((tmp_path / CLAIM).read_text())["pid"] == os.getpid()


def test_a_run_of_a_machine_that_may_be_dead_is_warned_of(holder, tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(sync, "LEAVES_S", 0.5)
    (tmp_path / CLAIM).write_text('{"host": "node-7", "pid": 12}')
    claim(tmp_path, 0, 1)
    assert "process 12 on node-7 is training there, or was until its machine died; going on" in caplog.text


def test_only_rank_0_lists_and_checks_the_shards(corpus: Corpus, tmp_path):
    """strace would tell, but is not everywhere: ranks run with a Python that counts what os.stat is asked."""
    counting = tmp_path / "counting"
    counting.mkdir()
    (counting / "sitecustomize.py").write_text(COUNTING)
    env = {"PYTHONPATH": str(counting), "COUNTED": str(tmp_path)}
    with pytest.MonkeyPatch.context() as patch:
        for name, value in env.items():
            patch.setenv(name, value)
        done = run_ranks(corpus, tmp_path / "out", "--run.max_steps=1", ranks=2)
    assert done.code == 0, done.output
    asked = {rank: (tmp_path / f"rank{rank}").read_text().splitlines() for rank in (0, 1)}
    shards = sum(path.suffix == ".tar" for path in corpus.tokens.iterdir())
    assert len(asked[0]) == shards
    assert asked[1] == []


COUNTING = """
import os
stat, asked = os.stat, []
def counting(path, *rest, **more):
    if str(path).endswith(".tar"):
        asked.append(str(path))
    return stat(path, *rest, **more)
os.stat = counting
leave = os._exit
def leave_and_tell(code):
    if os.environ.get("RANK"):
        open(f"{os.environ['COUNTED']}/rank{os.environ['RANK']}", "w").write("\\n".join(asked))
    leave(code)
os._exit = leave_and_tell
"""


def test_a_mistake_of_rank_0_is_raised_on_every_rank(corpus: Corpus, tmp_path):
    """Else the others would wait for what never comes."""
    done = run_ranks(corpus, tmp_path, "--data.train=/nowhere", "--run.max_steps=1", ranks=2)
    assert done.code == 1
    assert "/nowhere/manifest.json: no such file" in done.output
    assert "Traceback" not in done.output
