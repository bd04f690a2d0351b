"""The acceptance script on the CPU: its comparisons at every push, all of its parts in the nightly run."""

import json
import math
import sys

import pytest

from tests.gpu import accept, parts
from tests.helpers.runs import Corpus, run_command


def test_the_machine_is_described(corpus: Corpus, tmp_path):
    passed, figure, found = parts.machine(parts.Setup(tmp_path, corpus.tokens, dry=True))
    assert passed
    assert figure.startswith("cpu (not in telemetry/cards.py), ")
    assert found["ops"].startswith("ops: ")
    assert all(float(found[name]) > 0 for name in ("copy_gb_per_s", "product_tflops", "launch_us"))


def test_curves_of_other_lengths_are_not_the_same():
    assert parts.largest_difference([1.0, 2.02], [1.0, 2.0]) == pytest.approx(0.01)
    assert parts.largest_difference([1.0], [1.0, 2.0]) == math.inf
    assert parts.largest_difference([], []) == math.inf


def test_a_failed_required_part_is_exit_code_1(corpus: Corpus, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(accept, "start_part", lambda number, options: {"passed": number != 3, "figure": "x"})
    flags = ["accept.py", "--dry-run", "--out", str(tmp_path), "--tokens", str(corpus.tokens)]
    for only, code in (("", 1), ("3", 1), ("1,2,4,5", 0), ("0,6,7", 0)):
        monkeypatch.setattr(sys, "argv", [*flags, *(["--only", only] if only else [])])
        assert accept.main() == code
    assert "| 3 curves | NO | 0 | x |" in capsys.readouterr().out


@pytest.mark.parametrize(("only", "wrong"), [("9", "9"), ("a", "a"), ("0,,1", ""), ("-1", "-1"), ("", "")])
def test_a_part_that_does_not_exist_is_refused(only, wrong, corpus: Corpus, tmp_path, monkeypatch, capsys):
    flags = ["--dry-run", "--out", str(tmp_path), "--tokens", str(corpus.tokens), f"--only={only}"]
    monkeypatch.setattr(sys, "argv", ["accept.py", *flags])
    with pytest.raises(SystemExit) as left:
        accept.main()
    assert left.value.code == 2
    message = capsys.readouterr().err.splitlines()[-1]
    assert message.endswith(f"argument --only: {only} has the part {wrong!r}, expected numbers from 0 to 8: 0,2")


def test_without_shards_or_a_gpu_it_says_what_to_do(corpus: Corpus, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(parts.torch.cuda, "is_available", lambda: False)
    for tokens, message in ((tmp_path, "Run bash launch/quickstart/prepare.sh"), (corpus.tokens, "torch sees no GPU")):
        monkeypatch.setattr(sys, "argv", ["accept.py", "--out", str(tmp_path), "--tokens", str(tokens)])
        with pytest.raises(SystemExit):
            accept.main()
        assert message in capsys.readouterr().err


@pytest.mark.nightly
def test_all_parts_run_on_the_cpu(corpus: Corpus, tmp_path):
    command = [sys.executable, "tests/gpu/accept.py", "--dry-run", f"--out={tmp_path}", f"--tokens={corpus.tokens}"]
    done = run_command(command, timeout_s=1500)
    assert done.code == 0, done.output
    for number in range(len(accept.PARTS)):
        assert json.loads((tmp_path / f"{number}.json").read_text())["passed"], done.output
