"""Figures are written completely or not at all, to the file that was named, with names as they are."""

import errno
import os
from pathlib import Path

import pytest
from matplotlib.figure import Figure
from matplotlib.image import imread

from megabert.plots import figures
from megabert.plots.figures import as_label, save_figure
from megabert.plots.pareto import Panel, plot_pareto
from megabert.plots.run_curves import plot_runs
from megabert.plots.score_bars import Bar, plot_score_bars

NAMES = ["a$\\foo{$", "$", "$x$", "_hidden", "plain"]


def drawn_names(monkeypatch) -> list[str]:
    """Collect the legends' and axes' texts of each figure that is saved."""
    texts: list[str] = []

    def save(figure: Figure, out: Path) -> None:
        for axes in figure.axes:
            texts.extend(text.get_text() for text in axes.get_xticklabels())
            if (legend := axes.get_legend()) is not None:
                texts.extend(text.get_text() for text in legend.get_texts())
        save_figure(figure, out)

    for module in ("run_curves", "pareto", "score_bars"):
        monkeypatch.setattr(f"megabert.plots.{module}.save_figure", save)
    return texts


def test_names_of_runs_and_tasks_are_drawn_as_they_are(tmp_path, monkeypatch):
    texts = drawn_names(monkeypatch)
    for name in NAMES:
        (tmp_path / name).mkdir()
        (tmp_path / name / "metrics.jsonl").write_text(
            '{"step": 1, "loss": 2.0, "tokens": 3, "seconds": 4, "tokens_per_s": 5}\n'
        )
    plot_runs([tmp_path / name for name in NAMES], tmp_path / "runs.png")
    plot_pareto([Panel("hours", {name: [(1.0, 2.0)] for name in NAMES}, [(1.0, 2.0)])], "$", tmp_path / "pareto.png")
    plot_score_bars([Bar(name, "label", 1.0, None) for name in NAMES], NAMES, ["label"], "$x", tmp_path / "bars.png")
    for name in NAMES:
        assert texts.count(as_label(name)) == 3
    assert all(label.replace("\\$", "$").strip() in NAMES for label in map(as_label, NAMES))


def test_a_full_disk_keeps_the_earlier_image(tmp_path, monkeypatch):
    out = tmp_path / "a.png"
    out.write_bytes(b"earlier")

    def full(path: Path, data: bytes) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))

    monkeypatch.setattr(figures, "write_atomically", full)
    with pytest.raises(OSError, match=str(out)):
        save_figure(Figure(), out)
    assert out.read_bytes() == b"earlier"


def test_an_image_is_written_under_the_name_that_was_given(tmp_path):
    (tmp_path / "target").touch()
    (tmp_path / "link.png").symlink_to("target")
    for name in ("new/a.png", "without-end", "link.png"):
        save_figure(Figure(), tmp_path / name)
        assert imread(tmp_path / name, format="png").ndim == 3
    assert (tmp_path / "link.png").is_symlink()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["link.png", "new", "target", "without-end"]


def test_what_is_no_image_is_refused_by_name(tmp_path):
    for out in (tmp_path, Path("/dev/null")):
        with pytest.raises(ValueError, match=f"{out}: exists and is not a file"):
            save_figure(Figure(), out)
    with pytest.raises(ValueError, match="a.xyz: Format 'xyz' is not supported"):
        save_figure(Figure(), tmp_path / "a.xyz")
