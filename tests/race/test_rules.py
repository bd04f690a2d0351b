"""The race's rules: records that outlive a kill, the clock's arithmetic, statistics, fresh seeds, fair searches."""

import itertools
import json
import math
from types import SimpleNamespace
from typing import ClassVar

import numpy as np
import pytest
import torch
from race import clock, trials, variants
from race.clock import Clock, excess_steps
from race.records import COMMITTED, Records, read_records
from race.sides.baseline import Baseline
from race.sides.grids import FULL, QUICK, SEARCH_SEEDS, SHAPES, baseline_grid, open_ours, our_grid
from race.sides.ours import DS_CONFIG, Ours
from race.texts.corpora import HeldOutRow
from race.trials import Track, Trial

from megabert import load_recipe
from megabert.config.ds_config import read_ds_config
from megabert.config.recipe_parser import ds_config_path
from megabert.training.plan import make_plan
from megabert.training.updates.guard import DivergedError

SIZES = ("num_hidden_layers", "hidden_size", "num_attention_heads", "intermediate_size")


class Fake:
    """A contender whose loss is known. trained: what was trained, as (name, steps, seed)."""

    side = "ours"
    slowdown = 1.0
    turns: ClassVar[list[str]] = []

    def __init__(self, name="a", seconds=1.0, killed_at=None):
        self.name, self.seconds, self.killed_at = name, seconds, killed_at
        self.trained = []

    @property
    def settings(self):
        return {"name": self.name}

    profile = settings

    def train(self, corpus, steps, seed, out):
        if len(self.trained) == self.killed_at:
            raise KeyboardInterrupt
        self.trained.append((self.name, steps, seed))
        if self.name == "broken":
            raise DivergedError("all updates were skipped")
        return out

    def load(self, folder):
        return self.name

    def reference_step(self, corpus, steps, warm_up, out):
        Fake.turns.append(self.name)
        return self.seconds * Fake.slowdown, self.seconds

    def step_seconds(self, corpus, steps, out):
        Fake.turns.append(self.name)
        return [self.seconds * Fake.slowdown] * steps


class FakeCorpus:
    name, hash = "text", "1234"


@pytest.fixture
def track(tmp_path, monkeypatch):
    monkeypatch.setattr(trials.scoring, "held_out_loss", lambda model, corpus: float(ord(model)))
    monkeypatch.setattr(Track, "clock", lambda self, contender: Clock(1.0, 0.5, [1.0]))
    return Track(FakeCorpus(), Records(tmp_path / "records.jsonl", tmp_path), tmp_path / "out", [], 0)


def test_half_a_line_of_a_killed_command_costs_one_record(tmp_path):
    path = tmp_path / "out/records.jsonl"
    records = Records(path, tmp_path)
    records.append({"kind": "trial", "loss": 1.0})
    with open(path, "ab") as file:
        file.write(b'{"kind": "trial", "lo')
    again = Records(path, tmp_path)
    again.append({"kind": "trial", "loss": 2.0})
    assert [row["loss"] for row in Records(path, tmp_path).find(kind="trial")] == [1.0, 2.0]
    assert again.last(kind="trial") == {"kind": "trial", "loss": 2.0}
    assert again.last(kind="clock") is None


def test_committed_records_count_too_unless_the_race_is_fresh(tmp_path):
    (tmp_path / "earlier.jsonl").write_text('{"kind": "trial", "seed": 1}\n')
    assert Records(tmp_path / "none/records.jsonl", tmp_path).last(kind="trial") == {"kind": "trial", "seed": 1}
    assert Records(tmp_path / "none/records.jsonl", committed=None).rows == []


@pytest.mark.parametrize("path", sorted(COMMITTED.glob("*.jsonl")), ids=lambda path: path.name)
def test_the_committed_records_are_whole(path):
    rows = list(read_records(path))
    assert len(rows) == len(path.read_text().splitlines())
    assert all(row["kind"] in ("startup", "round", "final round", "trial") and row["corpus"] for row in rows)


def test_a_search_goes_on_where_it_was_killed(track, tmp_path):
    names = "dabce"
    killed = [Fake(name, killed_at=0 if name == "b" else None) for name in names]
    with pytest.raises(KeyboardInterrupt):
        trials.halve(track, killed, [3, 6])
    again, contenders = Records(tmp_path / "records.jsonl", tmp_path), [Fake(name) for name in names]
    resumed = Track(track.corpus, again, track.out, [], 0)
    ranked = trials.halve(resumed, contenders, [3, 6])
    # 3 s buy 4 steps and 6 s buy 10; "d" and "a" were trained for 3 s already, and the best two of five went on.
    assert [contender.trained for contender in contenders] == [
        [], [("a", 10, SEARCH_SEEDS[0])], [("b", 4, 1), ("b", 10, 1)], [("c", 4, 1)], [("e", 4, 1)],
    ]  # fmt: skip
    assert [(loss, contender.name) for loss, contender in ranked] == [(97.0, "a"), (98.0, "b")]


def test_a_search_ends_when_one_setting_is_left(track):
    contenders = [Fake(name) for name in "dabc"]
    ranked = trials.halve(track, contenders, [3, 6, 12])
    assert ranked[0] == (97.0, contenders[1])
    assert [steps for contender in contenders for _, steps, _ in contender.trained] == [4] * 4
    assert trials.halve(track, [Fake("e")], [3, 6])[0][0] == 101.0, "a search of one setting has its loss"


def test_a_setting_that_fails_is_recorded_as_the_worst(track):
    ranked = trials.halve(track, [Fake("broken"), Fake("a")], [3])
    assert [loss for loss, _ in ranked] == [97.0, math.inf]
    assert track.records.last(loss=None)["failed"] == "all updates were skipped"
    assert trials.halve(track, [Fake("a")], [1])[0][0] == math.inf, "the budget does not pay for the start-up"


class Constant:
    """A model whose loss shows how many threads it has: n log 2, since each of its 2^n tokens is equally likely."""

    def eval(self):
        return self

    float = eval

    def __call__(self, input_ids, attention_mask):
        return SimpleNamespace(logits=torch.zeros(*input_ids.shape, 2 ** torch.get_num_threads()))


class Picklable(Fake):
    def train(self, corpus, steps, seed, out):
        if self.name == "broken":
            raise DivergedError("all updates were skipped")
        return out

    def load(self, folder):
        return Constant()


class OneToken(FakeCorpus):
    held_out: ClassVar = [HeldOutRow(np.array([1]), np.array([0]), np.array([1]))]


def test_independent_trials_share_the_threads_and_are_recorded_by_one_process(tmp_path):
    records = Records(tmp_path / "records.jsonl", tmp_path)
    shared = Track(OneToken(), records, tmp_path / "out", [], 0, processes=2)
    wanted = [Trial(Picklable(name), 5, seed) for name, seed in (("a", 1), ("broken", 1), ("b", 2))]
    threads = torch.get_num_threads()
    torch.set_num_threads(4)
    try:
        found = shared.trials(wanted)
    finally:
        torch.set_num_threads(threads)
    # Two threads each, and then all four.
    assert [record["loss"] for record in found] == [
        pytest.approx(2 * math.log(2)),
        None,
        pytest.approx(4 * math.log(2)),
    ]
    assert [record["seed"] for record in found] == [1, 1, 2]
    assert list(read_records(tmp_path / "records.jsonl")) == records.rows
    assert len(records.rows) == 3
    assert shared.trials(wanted) == found, "what was trained is not trained again"


def test_trials_share_all_threads():
    assert trials.share_threads(2, 2, 4) == [1, 1, 1, 1]
    assert trials.share_threads(8, 8, 11) == [1] * 8 + [2, 2, 2]
    assert trials.share_threads(2, 2, 3) == [1, 1, 2]


def test_a_budget_buys_the_steps_that_fit():
    ours = Clock(startup_s=2.0, step_s=0.1, ratios=[])
    assert [ours.steps_in(budget) for budget in (1.0, 2.0, 2.05, 2.1, 12.0)] == [0, 0, 0, 1, 100]
    assert ours.seconds(100) == pytest.approx(12.0)
    assert excess_steps([9, 1, 1, 1]) == 8.0
    assert excess_steps([1, 1, 1, 1]) == 0.0


def test_the_clock_measures_in_turns_and_other_load_does_not_change_it(tmp_path, monkeypatch):
    monkeypatch.setattr(clock, "REFERENCE", Fake("reference", 1.0))
    monkeypatch.setattr(clock, "startup_steps", lambda *_: 4.0)
    cores = clock.place(FakeCorpus())["cores"]
    found = []
    for load in (1.0, 7.0):
        Fake.slowdown, Fake.turns = load, []
        records = Records(tmp_path / f"{load}.jsonl", tmp_path / "committed")
        contenders = [Fake("a", 0.5), Fake("b", 0.25)]
        clock.measure(contenders, FakeCorpus(), records)
        assert Fake.turns == ["reference", "a", "b"] * 5
        found.append([clock.find(contender, FakeCorpus(), records) for contender in contenders])
    # The reference's step takes 1 s of processor time.
    assert found[0] == found[1] == [
        Clock(4 * step / cores, step / cores, [step] * 5) for step in (0.5, 0.25)
    ]  # fmt: skip
    clock.measure([*contenders, Fake("c")], FakeCorpus(), records)
    assert Fake.turns[15:] == ["reference", "c"] * 5, "what has a clock is not measured again"


def test_the_finalists_have_rounds_of_their_own(tmp_path, monkeypatch):
    """They decide how many of our steps are worth one of the baseline's, whose seconds are those of the search."""
    monkeypatch.setattr(clock, "startup_steps", lambda *_: 4.0)
    monkeypatch.setattr(clock, "REFERENCE", Fake("reference", 1.0))
    records = Records(tmp_path / "records.jsonl", tmp_path / "committed")
    theirs, mine = Fake("theirs", 1.0), Fake("mine", 0.5)
    Fake.slowdown = 3.0
    clock.measure([theirs, mine], FakeCorpus(), records)
    of_search = clock.find(theirs, FakeCorpus(), records)
    assert of_search is not None
    Fake.turns, mine.seconds = [], 0.25
    clocks = clock.measure_finalists(theirs, mine, FakeCorpus(), records)
    assert Fake.turns == ["theirs", "mine"] * clock.FINAL_ROUNDS
    assert clocks[0] == of_search._replace(ratios=[1.0] * clock.FINAL_ROUNDS)
    step = 0.25 * of_search.step_s
    assert clocks[1] == Clock(4 * step, step, [0.25] * clock.FINAL_ROUNDS)
    again = Records(tmp_path / "records.jsonl", tmp_path / "committed")
    assert clock.measure_finalists(theirs, mine, FakeCorpus(), again) == clocks
    assert len(Fake.turns) == 2 * clock.FINAL_ROUNDS, "what was measured is not measured again"
    other = Fake("other", 0.5)
    clock.measure([other], FakeCorpus(), records)
    assert clock.measure_finalists(theirs, other, FakeCorpus(), records)[0] == clocks[0]


def test_a_race_continues_with_the_clock_of_the_machine_that_began_it(tmp_path, monkeypatch):
    monkeypatch.setattr(clock, "startup_steps", lambda *_: 4.0)
    records = Records(tmp_path / "records.jsonl", tmp_path / "committed")
    theirs, mine = Fake("theirs", 1.0), Fake("mine", 0.5)

    def measure(cpu, seconds, contenders):
        monkeypatch.setattr(clock, "machine", lambda: {"cpu": cpu, "cores": 2})
        monkeypatch.setattr(clock, "REFERENCE", Fake("reference", seconds))
        Fake.slowdown, Fake.turns = 1.0, []
        clock.measure(contenders, FakeCorpus(), records)
        return [clock.find(each, FakeCorpus(), records) for each in contenders]

    first = measure("slow", 2.0, [mine, theirs])
    assert measure("fast", 1.0, [mine, theirs]) == first
    assert Fake.turns == []
    # A new setting is measured where the race continues: a quarter of the fast machine's reference step, which takes
    # 2 s of processor time on two cores of the first machine.
    assert measure("fast", 1.0, [mine, Fake("new", 0.25)])[1] == Clock(1.0, 0.25, [0.25] * 5)
    assert Fake.turns == ["reference", "new"] * 5
    finalists = clock.measure_finalists(theirs, mine, FakeCorpus(), records)
    assert {row["cpu"] for row in records.find(kind="final round")} == {"fast"}
    assert {row["cpu"] for row in records.find(kind="startup", profile=clock.profile_of(mine))} == {"slow", "fast"}
    monkeypatch.setattr(clock, "machine", lambda: {"cpu": "third", "cores": 8})
    assert clock.measure_finalists(theirs, mine, FakeCorpus(), records) == finalists


def test_a_clock_that_was_killed_goes_on_with_the_next_round(tmp_path, monkeypatch):
    Fake.slowdown, Fake.turns = 1.0, []
    monkeypatch.setattr(clock, "REFERENCE", Fake("reference", 1.0))
    monkeypatch.setattr(clock, "startup_steps", lambda *_: 4.0)
    records = Records(tmp_path / "records.jsonl", tmp_path)
    monkeypatch.setattr(clock, "ROUNDS", 3)
    clock.measure([Fake("a")], FakeCorpus(), records)
    monkeypatch.setattr(clock, "ROUNDS", 5)
    again = Records(tmp_path / "records.jsonl", tmp_path)
    assert clock.find(Fake("a"), FakeCorpus(), again) is None
    clock.measure([Fake("a")], FakeCorpus(), again)
    assert [row["kind"] for row in again.rows] == ["startup"] + ["round"] * 5


@pytest.mark.parametrize("plan", [FULL, QUICK])
def test_no_seed_is_used_for_two_purposes(plan):
    used = [SEARCH_SEEDS, *(plan.final_seeds(attempt) for attempt in range(1 + len(plan.ladder)))]
    seeds = list(itertools.chain(*used))
    assert len(seeds) == len(set(seeds))
    assert len(plan.final_seeds(3)) == plan.seeds


def test_the_baseline_has_enough_settings_and_one_size():
    grid = baseline_grid(quick=False)
    assert len({json.dumps(each.settings) for each in grid}) == len(grid) >= 24
    assert {each.layout for each in grid} == {"documents", "blocks"}
    assert {each.batch for each in grid} == {8, 16, 32, 64}
    assert {each.masking for each in grid} == {0.15, 0.3}
    assert {each.dropout for each in grid} == {0.0, 0.1}
    assert len({each.warmup for each in grid}) > 1 < len({each.initializer_range for each in grid})
    assert {(each.layers, each.width) for each in grid} == {(4, 256)}
    assert Baseline(lr=1.0).profile == Baseline(masking=0.3).profile != Baseline(dropout=0.1).profile


def test_our_settings_are_recipes_of_the_same_size():
    grid = our_grid(quick=False)
    assert len({json.dumps(each.settings) for each in grid}) == len(grid)
    names = ("model.num_hidden_layers", "model.hidden_size", "optimizer.final_lr")
    assert {tuple(each.settings[name] for name in names) for each in grid} == {(4, 256, 0.0)}
    # Reading a recipe is slow, so only those with settings that none before them has are read.
    known: set[str] = set()
    for each in grid:
        if not known >= each.settings.keys():
            make_plan(recipe_of(each), read_ds_config(ds_config_path(DS_CONFIG)), rank=0, world_size=1)
        known |= each.settings.keys()
    sizes = [tuple(each.settings[f"model.{name}"] for name in SIZES) for each in open_ours(grid[0])]
    assert sizes == [*SHAPES]


def recipe_of(contender):
    sections = {}
    for name, value in contender.settings.items():
        section, setting = name.split(".")
        sections.setdefault(section, {})[setting] = value
    return load_recipe("quickstart", **sections)


def test_the_ablation_changes_one_thing_at_a_time():
    contenders = variants.contenders()
    assert next(iter(contenders)) == "BERT"
    for name, settings in contenders.items():
        changed = sum(value != variants.BERT[key] for key, value in settings.items())
        assert changed == {"BERT": 0, "MosaicBERT": 5}.get(name, 1)
    recipe = recipe_of(Ours(contenders["MosaicBERT"]))
    model = recipe.model
    assert (model.position, model.ffn, model.padding) == ("alibi", "geglu", "unpadded")
    assert recipe.masking.mlm_probability == 0.3
    table = variants.as_table({"BERT": [variants.Point(600.0, 4.5, 0.01, 0.7512, 0.004)]}, FULL)
    assert table.splitlines()[-1] == "| BERT | 4.500, std 0.010 | 75.12, std 0.40 |"
