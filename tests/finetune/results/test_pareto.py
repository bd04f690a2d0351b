"""launch/pareto.py on checkpoints of two runs of a model that trains in milliseconds."""

import json
import re
import runpy
from pathlib import Path

import pytest

from megabert.files.checkpoint_format import MANIFEST, STATE
from megabert.files.hashing import file_sha256
from megabert.finetune.results import pareto
from megabert.finetune.results.pareto import Point
from megabert.finetune.results.report import write_results
from megabert.plots.pareto import plot_pareto
from tests.convert.helpers.checkpoints import write_checkpoint
from tests.convert.helpers.small_model import small_model
from tests.finetune.helpers.locks import held
from tests.helpers.runs import REPOSITORY, Corpus


def test_each_cost_has_its_own_front(tmp_path):
    points = [
        Point("a", 1, 0.5, 1.0, 10.0, 8.0),
        Point("a", 2, 0.6, 2.0, 20.0, 16.0),
        Point("b", 1, 0.55, 3.0, 9.0, 3.0),
        Point("b", 2, 0.6, 4.0, 20.0, 4.0),
    ]
    marked = pareto.mark_fronts(points)
    assert [point.fronts for point in marked] == [("hours",), ("hours", "tokens"), ("tokens", "dollars"), ("dollars",)]
    assert "| b | 1 | 55.00 | 3.000 | 9 | 3.00 | tokens, dollars |" in pareto.as_markdown(marked)
    assert "a: only 2 checkpoints; train with run.keep_every_steps to keep more" in pareto.as_markdown(marked)
    more = [Point("a", 3, 0.0, 9.0, 9.0, 9.0), Point("b", 3, 0.0, 9.0, 9.0, 9.0)]
    assert "only" not in pareto.as_markdown([*marked, *more])
    panels = pareto.panels(marked)
    assert [panel.cost for panel in panels] == ["wall-clock hours", "real tokens", "dollars"]
    assert panels[1].lines == {"a": [(10.0, 50.0), (20.0, 60.0)], "b": [(9.0, pytest.approx(55.0)), (20.0, 60.0)]}
    assert panels[1].front == [(9.0, pytest.approx(55.0)), (20.0, 60.0)]
    short = pareto.panels([Point("a", 1, 0.5, 0.01, 10.0, None), Point("a", 2, 0.6, 0.02, 20.0, None)])[0]
    assert short.cost == "wall-clock seconds"
    assert short.lines == {"a": [(pytest.approx(36.0), 50.0), (pytest.approx(72.0), 60.0)]}
    plot_pareto(panels, "test", tmp_path / "pareto.png")
    assert (tmp_path / "pareto.png").read_bytes().startswith(b"\x89PNG")


def test_runs_are_named_by_the_ends_of_their_paths_that_differ(tmp_path):
    folders = [tmp_path / name for name in ("a/base", "b/base", "b/small")]
    assert pareto.name_runs(folders) == dict(zip(["a/base", "b/base", "b/small"], folders, strict=True))
    assert list(pareto.name_runs(folders[1:])) == ["base", "small"]
    with pytest.raises(ValueError, match="base is listed twice"):
        pareto.name_runs([folders[0], tmp_path / "b/../a/base"])


def run_of(out: Path, corpus: Corpus, seed: int, used: dict[int, float], world_size: int = 1) -> Path:
    """Write a run's folder. used: step -> seconds that its checkpoint records."""
    for step, seconds in used.items():
        folder = write_checkpoint(out, small_model(seed), corpus.tokenizer, step=step, world_size=world_size)
        state = json.loads((folder / STATE).read_text())
        (folder / STATE).write_text(json.dumps(state | {"wall_seconds": seconds}))
        manifest = json.loads((folder / MANIFEST).read_text())
        manifest[STATE] = ((folder / STATE).stat().st_size, file_sha256(folder / STATE))
        (folder / MANIFEST).write_text(json.dumps(manifest))
    return out


@pytest.fixture
def launch(glue, in_process, tmp_path, monkeypatch, capsys):
    """Run the command in this process. Returns exit code, stdout and stderr."""
    (tmp_path / "tiny.yaml").write_text("settings: {lr: 1.0e-3, epochs: 1, batch_size: 8, max_seq_len: 32}\n")
    same = [f"--data={glue}", f"--protocol={tmp_path / 'tiny.yaml'}", "--ops=torch", f"--out={tmp_path / 'pareto'}"]

    def run(*flags: str) -> tuple[int | str | None, str, str]:
        monkeypatch.setattr("sys.argv", ["launch/pareto.py", *flags, *same])
        with pytest.raises(SystemExit) as end:
            runpy.run_path(str(REPOSITORY / "launch/pareto.py"), run_name="__main__")
        return end.value.code, *capsys.readouterr()

    return run


def test_two_runs_give_a_table_a_plot_and_records(corpus, tmp_path, launch):
    one = run_of(tmp_path / "one/base", corpus, 0, {1: 3600.0, 2: 7200.0, 3: 10_800.0})
    other = run_of(tmp_path / "other/base", corpus, 1, {2: 1800.0}, world_size=2)
    code, output, errors = launch(f"--runs={one},{other}", "--tasks=sst2,rte", "--dollars-per-gpu-hour=2.5")
    assert code == 0, errors
    points = json.loads((tmp_path / "pareto/pareto.json").read_text())
    assert [(point["run"], point["step"], point["hours"], point["tokens"], point["dollars"]) for point in points] == [
        ("one/base", 1, 1.0, 1000, 2.5),
        ("one/base", 2, 2.0, 2000, 5.0),
        ("one/base", 3, 3.0, 3000, 7.5),
        ("other/base", 2, 0.5, 2000, 2.5),
    ]
    for point in points:
        results = json.loads((tmp_path / "pareto" / point["run"] / f"step-{point['step']:08}/results.json").read_text())
        assert point["score"] == results["average"]
    assert any("hours" in point["fronts"] for point in points)
    assert "other/base: only 1 checkpoint; train with run.keep_every_steps" in output
    assert "one/base: only" not in output
    assert (tmp_path / "pareto/pareto.md").read_text() in output
    assert (tmp_path / "pareto/pareto.png").read_bytes().startswith(b"\x89PNG")


def test_a_second_command_on_one_folder_is_refused_before_any_training(corpus, tmp_path, launch, monkeypatch):
    monkeypatch.setattr("megabert.finetune.main.LOCK_TIMEOUT_S", 0.3)
    run, out = run_of(tmp_path / "run", corpus, 0, {1: 3600.0}), tmp_path / "pareto"
    out.mkdir()
    with held(out / "glue.lock", exclusive=True) as pid:
        code, _, error = launch(f"--runs={run}", "--tasks=sst2")
    assert (code, error.count("\n")) == (1, 1)
    assert f"{out}: process {pid} on " in error
    assert error.endswith("is fine-tuning there. Wait for it, end it, or choose another --out.\n")
    assert [path.name for path in out.iterdir()] == ["glue.lock"]


def test_results_that_were_changed_are_refused_with_a_remedy(corpus, tmp_path, launch):
    checkpoint = run_of(tmp_path / "run", corpus, 0, {1: 3600.0}) / "checkpoints/step-00000001"
    path = tmp_path / "results.json"
    write_results(path, {"average": None, "average_of": "mean of nothing"})
    with pytest.raises(ValueError, match="has no average .mean of nothing."):
        pareto.measure("run", checkpoint, path, 0.0)
    write_results(path, {"average": 0.5})
    assert pareto.measure("run", checkpoint, path, 0.0).score == 0.5
    edited = path.read_text().replace("0.5", "0.97")
    for content, reason in (
        (edited, "was changed since it was written: its content has another hash"),
        ('{"average": 0.97}', "has format_version 1, expected 2"),
        ('{"format_version": 2, "average": NaN}', "was changed since it was written"),
        ('{"a":' * 100_000, "damaged: it is not JSON"),
        ("[0.97]", "damaged: it holds a list, expected an object"),
    ):
        path.write_text(content)
        with pytest.raises(ValueError, match=re.escape(f"{path}: {reason}")) as error:
            pareto.measure("run", checkpoint, path, 0.0)
        assert str(error.value).endswith("Run the fine-tuning again: it reuses its jobs and writes the file anew.")
    path.unlink()
    with pytest.raises(ValueError, match=r"results\.json: no such file\. Run the fine-tuning first"):
        pareto.measure("run", checkpoint, path, 0.0)


def test_a_cost_that_was_edited_is_refused(corpus, tmp_path, launch):
    run = run_of(tmp_path / "run", corpus, 0, {1: 3600.0})
    path = run / "checkpoints/step-00000001" / STATE
    path.write_text(path.read_text().replace("3600.0", "1800.0"))
    code, _, error = launch(f"--runs={run}", "--tasks=sst2")
    assert (code, error.count("\n")) == (1, 1)
    assert f"{path} is damaged: its hash differs from the one in {MANIFEST}. Its cost cannot be trusted" in error
    assert not (tmp_path / "pareto").exists()


def test_checkpoints_without_a_score_or_a_cost_are_refused_before_any_training(corpus, tmp_path, launch):
    run = run_of(tmp_path / "run", corpus, 0, {1: 0.0})
    for more, message in (
        (["--tasks=wnli"], "--tasks wnli: it counts in no average"),
        (["--tasks=sst2"], "step-00000001: does not record its hours; an older version wrote it"),
        (
            ["--tasks=sst2", "--dollars-per-gpu-hour=-1"],
            "--dollars_per_gpu_hour is -1.0, expected a number in [0, 1e6]",
        ),
    ):
        code, _, error = launch(f"--runs={run}", *more)
        assert (code, error.count("\n")) == (2 if "dollars" in message else 1, 1), error
        assert message in error
    with pytest.raises(ValueError, match="has no checkpoints/step-"):
        pareto.checkpoints_of(tmp_path)
    assert not (tmp_path / "pareto").exists()
