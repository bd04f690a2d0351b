"""megabert.pretrain() trains in a process that continues afterwards, and restores its state."""

import json
import sys

import pytest

import megabert
from megabert.commands.notebook import PretrainResult, pretrain
from megabert.config import cli
from megabert.config.recipe_parser import load_recipe
from tests.helpers.runs import TINY, Corpus, run_command

# What a notebook would do: train, train again in the same folder and in another, look at the process, make an error.
NOTEBOOK = """
import json, os, signal, subprocess, sys, threading, time
import torch
import megabert
from megabert.training.updates.guard import DivergedError

settings, out = json.loads(sys.argv[1]), sys.argv[2]

def train(folder, **overrides):
    recipe = megabert.load_recipe("quickstart", **settings | {"run.output_dir": f"{out}/{folder}"} | overrides)
    return megabert.pretrain(recipe, ds_config="zero0")

def process():
    handlers = [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGUSR1)]
    group = torch.distributed.is_initialized()
    return handlers, dict(os.environ), torch.get_num_threads(), group, sys.excepthook, threading.active_count()

signal.signal(signal.SIGUSR1, signal.SIG_IGN)
torch.set_num_threads(2)
before = process()
results = [train("a"), train("a"), train("b")]
assert process() == before, process()
try:
    train("c", **{"data.train": "nowhere"})
except ValueError as error:
    print("error:", error)
assert process() == before, process()

# An error after some steps, when DeepSpeed has its groups, and a run after it.
from unittest import mock
diverged = DivergedError("5 updates in a row were skipped")
try:
    with mock.patch("megabert.training.loop.evaluate", side_effect=diverged):
        train("e")
except DivergedError as error:
    print("error:", error)
assert process() == before, process()
results.append(train("f"))

# SIGTERM after some steps.
def stop():
    while not os.path.exists(f"{out}/d/metrics.jsonl") or not os.path.getsize(f"{out}/d/metrics.jsonl"):
        time.sleep(0.01)
    os.kill(os.getpid(), signal.SIGTERM)
thread = threading.Thread(target=stop)
thread.start()
results.append(train("d", **{"run.max_steps": 100000}))
thread.join()
assert process() == before, process()
unlocked = "from pathlib import Path; from megabert.files.lock import acquire; acquire(Path(sys.argv[1]))"
for folder in "abdef":
    lock = f"{out}/{folder}/running.lock"
    subprocess.run([sys.executable, "-c", f"import sys; {unlocked}; print('unlocked')", lock], check=True)
for result in results:
    print(json.dumps([str(result.output_dir), result.steps, result.heldout_loss, result.exit_reason]))
"""


def test_it_trains_several_times_in_one_process_and_restores_the_process(corpus: Corpus, tmp_path):
    flags = [*TINY, f"--data.train={corpus.tokens}", "--run.max_steps=2"]
    settings = json.dumps(dict(flag.removeprefix("--").split("=", 1) for flag in flags))
    done = run_command([sys.executable, "tests/helpers/scripts/run_code.py", NOTEBOOK, settings, str(tmp_path)])
    assert done.code == 0, done.output
    assert "error: nowhere/manifest.json: no such file" in done.output
    first, again, second, after_error, stopped = [
        json.loads(line) for line in done.output.splitlines() if line.startswith("[")
    ]
    assert first[:2] == [str(tmp_path / "a"), 2]
    assert again == first, "the run was finished already"
    assert second[1:] == after_error[1:] == first[1:]
    assert "error: 5 updates in a row were skipped" in done.output
    assert first[3] == "finished"
    assert 0 < first[2] < 20
    assert stopped[2] is None
    assert "SIGTERM" in stopped[3]
    assert done.output.count("unlocked") == 5
    assert (tmp_path / "d/checkpoints/latest").read_text() == f"step-{stopped[1]:08d}"


def test_it_refuses_to_be_one_of_several_ranks(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ValueError, match=r"WORLD_SIZE is more than 1.*torchrun --nproc-per-node N -m megabert"):
        pretrain(load_recipe("quickstart", data={"train": "somewhere"}))


@pytest.mark.parametrize("ds_config", ["zero22", "nowhere.json"])
def test_an_unknown_ds_config_is_a_value_error(ds_config):
    with pytest.raises(ValueError, match=f"ds_config '{ds_config}' is neither a file nor one of: zero0, zero1"):
        megabert.pretrain(megabert.load_recipe(), ds_config=ds_config)


def test_an_error_names_the_installed_commands_where_there_is_no_checkout(tmp_path, monkeypatch):
    run = {"output_dir": str(tmp_path / "run")}
    recipe = megabert.load_recipe("quickstart", data={"train": str(tmp_path / "corpus")}, run=run)
    with pytest.raises(ValueError, match=r"manifest\.json: no such file.* data_prep/write_shards\.py"):
        megabert.pretrain(recipe, ds_config="zero0")
    monkeypatch.setattr(cli, "CHECKOUT", tmp_path)
    with pytest.raises(ValueError, match=r"manifest\.json: no such file.* megabert-shards"):
        megabert.pretrain(recipe, ds_config="zero0")


def test_importing_megabert_loads_nothing():
    code = """
import json, sys
before, finders = set(sys.modules), list(sys.meta_path)
import megabert
assert sys.meta_path == finders
print(json.dumps(sorted({name.split(".")[0] for name in set(sys.modules) - before})))
"""
    loaded = json.loads(run_command([sys.executable, "-c", code]).output)
    assert "megabert" in loaded
    assert not {"torch", "transformers", "deepspeed", "jsonargparse", "numpy"} & {*loaded}


def test_the_result_is_typed():
    assert PretrainResult.__annotations__.keys() == {"output_dir", "steps", "heldout_loss", "exit_reason"}
