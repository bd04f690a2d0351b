import pytest

from megabert.glue.protocol import protocol_names, read_protocol
from megabert.glue.tasks import EIGHT, GLUE

# lr, weight decay per step at the peak learning rate, epochs, batch, number of seeds, start: as MosaicBERT's code has them.
MOSAICBERT = {
    "mnli": (5e-5, 5e-6, 3, 48, 1, "checkpoint"),
    "qnli": (1e-5, 1e-6, 10, 16, 1, "checkpoint"),
    "qqp": (3e-5, 3e-6, 5, 16, 1, "checkpoint"),
    "sst2": (3e-5, 3e-6, 3, 16, 3, "checkpoint"),
    "cola": (5e-5, 5e-6, 10, 32, 4, "checkpoint"),
    "mrpc": (8e-5, 8e-6, 10, 32, 5, "mnli"),
    "rte": (1e-5, 1e-5, 3, 16, 5, "mnli"),
    "stsb": (3e-5, 3e-6, 10, 32, 5, "mnli"),
}


@pytest.mark.parametrize("name", MOSAICBERT)
def test_mosaicberts_protocol_is_the_papers(name):
    plan = read_protocol("mosaicbert").plan(GLUE[name])
    (settings,) = plan.candidates
    lr, decay, epochs, batch, seeds, start = MOSAICBERT[name]
    assert (settings.lr, settings.epochs, settings.batch_size, plan.start) == (lr, epochs, batch, start)
    assert settings.lr * settings.torch_decay == pytest.approx(decay)
    assert plan.seeds == (19, 8364, 717, 10536, 90166)[:seeds]
    assert (settings.betas, settings.eps, settings.max_seq_len, settings.warmup) == ((0.9, 0.98), 1e-6, 256, 0.06)
    assert settings.decay_norms_and_biases
    assert settings.max_grad_norm == 0
    assert (settings.precision, plan.metrics) == (("fp32", ("spearman",)) if name == "stsb" else ("auto", ()))


def test_modernberts_sweep():
    for name in EIGHT:
        plan = read_protocol("modernbert").plan(GLUE[name])
        assert len(plan.candidates) == 4 * 4 * 3
        assert {s.lr for s in plan.candidates} == {1e-5, 3e-5, 5e-5, 8e-5}
        assert {round(s.lr * s.torch_decay, 9) for s in plan.candidates} == {1e-6, 5e-6, 8e-6, 1e-5}
        assert {s.epochs for s in plan.candidates} == ({1, 2, 3} if name in ("sst2", "mnli", "rte") else {2, 5, 10})
        assert plan.start == ("mnli" if name in ("rte", "mrpc", "stsb") else "checkpoint")


def test_every_protocol_of_ours_is_read():
    assert {"mosaicbert", "modernbert", "quick", "quickstart"} == set(protocol_names())
    for name in protocol_names():
        protocol = read_protocol(name)
        assert protocol.about
        assert protocol.other.candidates


GOOD = "seeds: [1]\nsettings: {lr: 5e-5, epochs: 1, batch_size: 8}\ntasks:\n  rte: {start: mnli}\n"


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("lr:", "learning_rate:", "unknown key settings.learning_rate"),
        ("5e-5", "fast", "lr is 'fast', expected a number"),
        ("epochs: 1", "epochs: 1.5", "epochs is 1.5, expected a whole number"),
        ("epochs: 1", "epochs: 0", "epochs is 0, expected at least 1"),
        ("epochs: 1", "warmup: 2, epochs: 1", "warmup is 2.0, expected 0 to 1"),
        ("lr: 5e-5, ", "", "does not say lr"),
        ("start: mnli", "start: squad", "start is 'squad', expected checkpoint or mnli"),
        ("start: mnli", "pooling: max", "pooling is 'max', expected cls or mean"),
        ("start: mnli", "sweep: {lr: 1}", "expected a list of values"),
        ("start: mnli", "metrics: [bleu]", "metrics is \\['bleu'\\]"),
        ("[1]", "[]", "seeds is \\[\\], expected a list of numbers"),
        ("seeds", "seed", "unknown key seed. Did you mean seeds"),
        (GOOD, "[", "not valid YAML"),
        (GOOD, "text", "expected keys and values"),
    ],
)
def test_a_wrong_protocol_is_refused(tmp_path, old, new, message):
    (tmp_path / "own.yaml").write_text(GOOD.replace(old, new))
    with pytest.raises(ValueError, match=message):
        read_protocol(str(tmp_path / "own.yaml"))
    with pytest.raises(ValueError, match="neither a file nor one of .* Did you mean mosaicbert"):
        read_protocol("mosaicbrt")
