"""The timing of kernels: what a measured pass does, on the CPU."""

import re
from typing import Any

import pytest
import torch

from tests.benchmarks import bench_kernels
from tests.benchmarks.bench_kernels import WORK, Contender, contenders, passes, time_s
from tests.benchmarks.bench_train import Line, Run, median_figures, peak_of, ratio_figures, table_lines
from tests.benchmarks.support.contenders import Row, hf_modernbert, ours
from tests.helpers.runs import REPOSITORY


def test_every_operation_runs_with_small_inputs():
    found = contenders(torch.device("cpu"), tokens=512)
    assert found.keys() == WORK.keys()
    for name in ("geglu", "attention_512"):
        assert time_s(found[name]["eager"], repeats=1, sets=1) > 0


def test_a_pass_takes_the_inputs_in_turn_and_keeps_no_gradient():
    seen, given = [], []

    class Double(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            seen.append(x.data_ptr())
            return 2 * x

        @staticmethod
        def backward(ctx, gradient):  # type: ignore[override]
            given.append(gradient)
            return 2 * gradient

    contender = Contender(Double.apply, [torch.randn(8).requires_grad_()])
    work = passes(contender, sets=3)
    for _ in range(2):
        seen.clear()
        given.clear()
        work()
        assert len(set(seen)) == 3
        assert all(gradient.is_contiguous() and gradient.unique().numel() > 1 for gradient in given)
    assert contender.leaves[0].grad is None


@pytest.mark.triton
def test_libraries_are_counted(monkeypatch, capsys):
    from tests.benchmarks.support import libraries

    monkeypatch.setattr(libraries, "find_spec", lambda name: None)
    # One chunk of 40 rows, 512 columns: its products have 40, 512 and 512 rows.
    figures = libraries.compare(40, 16, 512, tokens=1024, heads=2)
    assert "pip install liger-kernel" in capsys.readouterr().out
    assert figures["loss_megabert_rows"] == 40
    assert figures["loss_megabert_waits"] == figures["loss_megabert_spills"] == 0
    logits, weight = 40 * 512 * 2, 512 * 16
    # The kernel, the three products and the bias's sum move the logits 7 times; dweight is summed in fp32.
    assert 7 * logits + (2 + 2 + 2 + 3 * 4) * weight <= figures["loss_megabert_moved_bytes"] < 10 * logits + 40 * weight
    for name in ("flops", "moved_bytes"):
        ours, theirs = (
            [figures[f"attention_{n}_{who}_{name}"] for n in (128, 512, 115)] for who in ("megabert", "flexattention")
        )
        assert ours[:2] == theirs[:2]
        assert ours[2] < theirs[2]
    assert figures["attention_128_flexattention_planning_bytes"] > 1024**2


@pytest.mark.triton
def test_the_table_of_occupancy_has_every_kernel(capsys, monkeypatch):
    from tests.benchmarks.support import occupancy

    launches = occupancy.kernels()
    files = {path.stem: path.read_text() for path in (REPOSITORY / "megabert/kernels").glob("*.py")}
    defined = {f"{name}.{kernel}" for name, text in files.items() for kernel in re.findall(r"def (\w+)_kernel\(", text)}
    assert {name.split(",")[0] for name in launches} == defined
    monkeypatch.setattr(occupancy, "kernels", lambda: {"geglu.forward": launches["geglu.forward"]})
    figures = occupancy.print_table(["sm_80"])
    assert 32 <= figures["warps_geglu.forward_sm_80"] <= 64
    assert re.search(r"\| geglu.forward \| 4 \| \d+, 0 KB, \d+ \|", capsys.readouterr().out)


def test_geglu_in_its_products_gains_nothing_at_the_speed_that_it_prints(monkeypatch):
    even = bench_kernels.geglu_in_products()["geglu_in_products_break_even"]
    monkeypatch.setattr(bench_kernels, "PRODUCTS_OF_TRITON", (even,))
    figures = bench_kernels.geglu_in_products()
    assert 0.5 < even < 1
    assert figures[f"geglu_in_products_gain_at_{100 * even:.0f}"] == pytest.approx(0, abs=1e-9)


def test_a_peak_that_varies_is_said_beside_the_mfu():
    assert peak_of([90.0, 100.0, 91.0]) == (100.0, "")
    assert peak_of([80.0, 100.0]) == (100.0, " (peak varied by 20%)")


def test_the_faster_hf_bert_is_the_one_that_is_compared_first():
    names = ["mosaicbert", "hf_bert, no attention dropout", "hf_bert"]
    speeds = [[8.0, 9.0, 8.0], [2.0, 3.0, 2.0], [1.0, 1.0, 1.0]]
    figures = ratio_figures("mini_512", names, speeds)
    assert figures["mini_512_vs_hf_bert"] == 8.0
    assert figures["mini_512_vs_faster_hf_bert"] == figures["mini_512_vs_hf_bert_no_attention_dropout"] == 4.0
    same = ratio_figures("modernbert_mini_512", ["modernbert", "hf_modernbert, same architecture"], speeds[:2])
    assert same == {"modernbert_mini_512_vs_hf_modernbert_same": 4.0}


def test_several_runs_of_a_row_are_shown_as_medians_and_a_range():
    def run(ratio, peak):
        lines = [Line("mosaicbert", 600.0, 1.0, 0.5, 70.0), Line("hf_bert", 600.0 / ratio, ratio, 0.1, 90.0)]
        return Run({"mini_512_vs_hf_bert": ratio, "mini_512_mfu": 0.5}, lines, [peak, 0.95 * peak])

    runs = [run(16.0, 100.0), run(6.0, 96.0), run(8.0, 80.0)]
    assert table_lines("mini_512", runs[:1]) == [
        "| mini_512 | mosaicbert | 600 |  | 50 % | 70 |",
        "|  | hf_bert | 38 | 16.00 | 10 % | 90 |",
    ]
    assert table_lines("mini_512", runs)[1] == (
        "|  | hf_bert | 75 | 8.00 (6.00 to 16.00) | 10 % (peak varied by 24%) | 90 |"
    )
    assert median_figures(runs) == {
        "mini_512_vs_hf_bert": 8.0, "mini_512_vs_hf_bert_lowest": 6.0, "mini_512_vs_hf_bert_highest": 16.0,
        "mini_512_mfu": 0.5,
    }  # fmt: skip
    assert median_figures(runs[:1]) == runs[0].figures


def test_the_rows_of_modernbert_have_the_architecture_that_they_are_compared_with():
    row = Row(2, 32, 2, 48, cap=32, tokens=64, rows=2, family="modernbert", vocab=2048)
    own, theirs = ours("modernbert", row), hf_modernbert(row)
    config: Any = theirs.model.config
    assert own.architecture.local_attention_window == config.local_attention
    assert [own.architecture.is_local(layer) for layer in range(2)] == [
        kind == "sliding_attention" for kind in config.layer_types
    ]
    sizes = [sum(parameter.numel() for parameter in contender.model.parameters()) for contender in (own, theirs)]
    assert sizes[0] == sizes[1]
