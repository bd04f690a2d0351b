"""A resumed run ends bitwise like an uninterrupted one, in weights and optimizer state, at every ZeRO stage."""

from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch

from megabert.config.recipe import OptimizerConfig
from megabert.convert.deepspeed_checkpoint import read_checkpoint
from megabert.files import checkpoint_format as layout
from megabert.training.telemetry.reporter import read_metrics
from tests.helpers.runs import Corpus, ds_config_in
from tests.helpers.scripts.many_runs import flags_of, run_many
from tests.training.helpers import shared_conversion
from tests.training.helpers.checkpoints import assert_same_end

STEPS, STOPPED = 4, 2
PLAIN, SAVING = f"--run.max_steps={STEPS}", f"--run.save_every_steps={STOPPED}"


def losses_of(out: Path, key: str = "loss") -> list[float]:
    return [record[key] for record in read_metrics(out / "metrics.jsonl") if key in record]


def checkpoint_of(out: Path, step: int = STOPPED) -> Path:
    return out / "checkpoints" / layout.tag_of(step)


ONE_RANK = ("zero0", "zero1", "zero2", "zero2_offload", "zero3")
SOME = {
    1: [("zero0", True), ("zero1", False), ("zero2", True), ("zero3", True)],
    2: [("zero1", False), ("zero3", True)],
}
ALL = {1: list(product(ONE_RANK, (False, True))), 2: list(product(("zero1", "zero2", "zero3"), (False, True)))}


@pytest.mark.parametrize(
    ("cases", "ranks"),
    [(cases, ranks) for ranks, cases in SOME.items()]
    + [pytest.param(cases, ranks, marks=pytest.mark.nightly) for ranks, cases in ALL.items()],
)
def test_a_resumed_run_ends_bitwise_the_same(corpus: Corpus, tmp_path, cases, ranks):
    """In fp32 and bf16. One process makes all runs; test_signals.py and fault_injection.py start new processes.

    The name of each folder would be a pattern that does not match itself.
    """
    folders, runs = [], []
    for stage, bf16 in cases:
        folder = tmp_path / f"{stage}[{bf16}]"
        folder.mkdir()
        config = ds_config_in(stage, folder, bf16)
        folders.append(folder)
        runs.append(flags_of(corpus, folder / "whole", config, PLAIN, SAVING))
        resume = f"--run.resume={checkpoint_of(folder / 'whole')}"
        runs.append(flags_of(corpus, folder / "resumed", config, PLAIN, resume))
    # Stage 2 resumes from stage 1.
    whole, other = tmp_path / "zero1[False]/whole", ds_config_in("zero2", tmp_path, bf16=False)
    runs.append(flags_of(corpus, tmp_path / "other", other, PLAIN, f"--run.resume={checkpoint_of(whole)}"))
    done = run_many(runs, ranks)
    assert done.code == 0, done.output
    assert done.output.count(f"resumed from {tmp_path}") == len(folders) + 1
    for folder in folders:
        assert_same_end(folder / "whole", folder / "resumed", STEPS)
    # On more ranks, stages 1 and 2 add gradients in different orders.
    if ranks == 1:
        assert_same_end(whole, tmp_path / "other", STEPS)


def test_saving_does_not_change_a_run(corpus: Corpus, tmp_path):
    """At stage 3, where saving partitions the weights again."""
    config = ds_config_in("zero3", tmp_path, bf16=False)
    runs = [flags_of(corpus, tmp_path / out, config, PLAIN, *more) for out, more in (("a", []), ("b", [SAVING]))]
    done = run_many(runs)
    assert done.code == 0, done.output
    assert_same_end(tmp_path / "a", tmp_path / "b", STEPS)


def assert_ranks_convert_as_one_does(checkpoint: Path, out: Path) -> None:
    """Byte for byte, also where a conversion was killed before."""
    (out / "3" / checkpoint.name / "zero/decoder.bias").mkdir(parents=True)
    (out / "3" / checkpoint.name / "zero/decoder.bias/fp32.pt").write_bytes(b"cut")
    (out / "3/left").touch()
    for size in (1, 3):
        assert shared_conversion.convert(checkpoint, out / str(size), size) == [None] * size
    one, three = (shared_conversion.hashes(out / str(size)) for size in (1, 3))
    assert len(one) > 40
    assert one == three


# The stage of a run, and the one at which it goes on.
FOLLOWS = {"zero0": "zero0", "zero1": "zero2", "zero2": "zero1", "zero3": "zero3"}


@pytest.mark.parametrize(
    ("stages", "counts"),
    [(["zero2", "zero3"], [1, 3]), pytest.param(list(FOLLOWS), [1, 3], marks=pytest.mark.nightly)],
)
def test_a_run_resumes_on_fewer_and_on_more_ranks(corpus: Corpus, tmp_path, stages, counts):
    """Data, masks and dropout stay the same, so losses differ by rounding only. Stages 1 and 2 are interchangeable.

    The name of the folder would be a pattern, and a regular expression, that does not match itself.
    """
    tmp_path /= "a[+1]"
    tmp_path.mkdir()
    batch = "--data.global_batch_tokens=1536"
    configs = {stage: ds_config_in(stage, tmp_path, bf16=False) for stage in FOLLOWS}
    done = run_many([flags_of(corpus, tmp_path / stage, configs[stage], PLAIN, SAVING, batch) for stage in stages], 2)
    assert done.code == 0, done.output
    for stage in set(stages) - {"zero0"}:
        assert_ranks_convert_as_one_does(checkpoint_of(tmp_path / stage), tmp_path / f"{stage}-converted")
    for ranks in counts:
        runs = []
        for stage in stages:
            resume = f"--run.resume={checkpoint_of(tmp_path / stage)}"
            config = configs[FOLLOWS[stage]]
            runs.append(flags_of(corpus, tmp_path / f"{stage}-{ranks}", config, PLAIN, batch, resume))
        done = run_many(runs, ranks)
        assert done.code == 0, done.output
        for stage in stages:
            stayed, moved = (losses_of(tmp_path / out) for out in (stage, f"{stage}-{ranks}"))
            assert len(stayed) == STEPS
            assert moved == pytest.approx(stayed[STOPPED:], rel=1e-6)
            stayed, moved = (losses_of(tmp_path / out, "heldout_loss")[-1] for out in (stage, f"{stage}-{ranks}"))
            # Evaluation is the same on 1, 2 and 3 ranks too.
            assert moved == pytest.approx(stayed, rel=1e-6)
            assert not list((tmp_path / stage / "checkpoints").glob(".tmp-*"))
            for file in checkpoint_of(tmp_path / f"{stage}-{ranks}", STEPS).glob("zero_pp*optim_states.pt"):
                assert_groups_are_right(torch.load(file, weights_only=False)["optimizer_state_dict"])


@pytest.mark.parametrize("more_ranks", [[2], pytest.param([2, 4, 8], marks=pytest.mark.nightly)])
def test_ranks_and_accumulation_give_one_curve_for_twenty_steps(corpus: Corpus, tmp_path, more_ranks):
    """1 rank x 8 micro-batches, 2 x 4 and others, with dropout: losses equal to 1e-6, weights to 1e-4.

    The biases of the keys are not compared: they add the same number to every score of a query, which softmax ignores,
    so their gradient is only rounding, which Adam scales up to full steps.
    """
    config = ds_config_in("zero2", tmp_path, bf16=False)
    settings = ["--data.global_batch_tokens=2048", "--run.max_steps=20"]
    for ranks in (1, *more_ranks):
        done = run_many([flags_of(corpus, tmp_path / str(ranks), config, *settings)], ranks)
        assert done.code == 0, done.output
    expected = read_checkpoint(tmp_path / "1")[0]
    for ranks in map(str, more_ranks):
        assert losses_of(tmp_path / ranks) == pytest.approx(losses_of(tmp_path / "1"), rel=1e-6)
        for name, weight in read_checkpoint(tmp_path / ranks)[0].items():
            pair = [weight, expected[name]]
            if name.endswith("attention.qkv.bias"):
                size = len(weight) // 3
                pair = [torch.cat([part[:size], part[2 * size :]]) for part in pair]
            torch.testing.assert_close(*pair, rtol=0, atol=1e-4, msg=lambda m, n=name: f"{n}: {m}")


def assert_groups_are_right(state: dict[str, Any]) -> None:
    """Assert that only matrices have weight decay, and that Adam counted every step of the run."""
    adam = state.get("base_optimizer_state") or state["optimizer_state_dict"]
    assert [group["weight_decay"] for group in adam["param_groups"]] == [OptimizerConfig().weight_decay, 0.0]
    assert [float(of["step"]) for of in adam["state"].values()] == [STEPS, STEPS]
