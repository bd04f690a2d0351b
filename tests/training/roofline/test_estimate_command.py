"""launch/estimate.py: what it prints, what it refuses, and its advice."""

import re
import runpy

import pytest

from tests.helpers.runs import REPOSITORY


@pytest.fixture
def call(capsys, monkeypatch):
    """Run the command in this process. Returns exit code, stdout and stderr."""

    def run(*flags):
        recipe = () if "--recipe" in flags else ("--recipe", "mosaicbert-base")
        monkeypatch.setattr("sys.argv", ["launch/estimate.py", *recipe, *flags])
        with pytest.raises(SystemExit) as end:
            runpy.run_path(str(REPOSITORY / "launch/estimate.py"), run_name="__main__")
        return end.value.code, *capsys.readouterr()

    return run


@pytest.mark.parametrize(
    ("flags", "shown"),
    [
        (
            ["--recipe", "mosaicbert-large", "--gpu", "a100", "--gpus", "8", "--price", "2.5"],
            ["Predicted, not measured: no GPU has run this code.", "GPU hours, $"],
        ),
        (["--gpu", "t4", "--gpus", "1"], ["TFLOP/s in fp32"]),
        (["--gpu", "h100", "--gpus", "8"], ["micro-batch       58,880 tokens, 1 on each GPU in a step"]),
        (
            ["--gpu", "t4", "--gpus", "1", "--data.micro_batch_tokens", "58880"],
            ["DOES NOT FIT: halve data.micro_batch_tokens"],
        ),
    ],
)
def test_the_command_prints_price_and_memory(call, flags, shown):
    code, out, errors = call(*flags)
    assert (code, errors) == (0, "")
    assert all(text in out for text in shown)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--gpu", "h1"], "no GPU is called h1 here, expected one of: a100"),
        (["--gpus", "7"], "evenly between 7 ranks. Set data.global_batch_tokens 473088, or use 4, 5 or 8 ranks"),
        (
            ["--gpus", "7", "--data.micro_batch_tokens", "14720"],
            "is 32 micro-batches of 14720 tokens, which 7 ranks cannot share evenly",
        ),
        (["--gpus", "0"], "--gpus is 0, expected a number in [1, 1048576]"),
        (["--zero", "4"], "--zero is 4, expected a number in [0, 3]"),
        (["--price", "-1"], "--price is -1.0, expected a number in (0, 1e6]"),
        (["--price", "0"], "--price is 0.0, expected a number in (0, 1e6]"),
        (["--recipe", "nope"], "recipe 'nope' is neither a file nor one of: bert-base"),
        (["--gp", "h100"], "unknown setting --gp. Did you mean --gpu?"),
        (["--gpus", "8", "--gpus=9"], "--gpus is given twice"),
    ],
)
def test_what_the_command_cannot_predict_is_one_line_and_exit_code_2(call, flags, message):
    code, out, errors = call(*flags)
    assert (code, out, errors.count("\n")) == (2, "", 1)
    assert errors.startswith("launch/estimate.py: ")
    assert message in errors


@pytest.mark.parametrize(
    ("recipe", "gpus"), [("mosaicbert-base", "3"), ("mosaicbert-base", "1000"), ("modernbert-large", "64")]
)
def test_the_commands_advice_can_be_followed(call, recipe, gpus):
    code, _, errors = call("--recipe", recipe, "--gpus", gpus)
    assert code == 2
    advice = re.split(r"[Ss]et ", errors)[1]
    flags = [f"--{name}={value}" for name, value in re.findall(r"(data\.\w+) (\d+)", advice)]
    code, out, errors = call("--recipe", recipe, "--gpus", gpus, *flags)
    assert (code, errors) == (0, "")
    assert f"{recipe} on {gpus} x h100" in out


def test_the_commands_refusal_of_fp8_can_be_followed(call):
    code, _, errors = call("--gpu", "a100", "--run.fp8", "torchao")
    assert code == 2
    assert "set run.fp8 to none" in errors
    assert call("--gpu", "a100", "--run.fp8", "none")[0] == 0
