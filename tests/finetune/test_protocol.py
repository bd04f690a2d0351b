import pytest

from megabert.finetune.protocol import protocol_names, read_protocol
from megabert.finetune.tasks.task import EIGHT, GLUE, Task

# As in MosaicBERT's code: lr, weight decay per step at the peak learning rate, epochs, batch size, number of seeds,
# start.
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
def test_the_protocol_mosaicbert_has_the_papers_values(name):
    plan = read_protocol("mosaicbert", []).plan_for(GLUE[name])
    (settings,) = plan.candidates
    lr, decay, epochs, batch, seeds, start = MOSAICBERT[name]
    assert (settings.lr, settings.epochs, settings.batch_size, plan.start) == (lr, epochs, batch, start)
    assert settings.lr * settings.torch_decay == pytest.approx(decay)
    assert plan.seeds == (19, 8364, 717, 10536, 90166)[:seeds]
    assert (settings.betas, settings.eps, settings.max_seq_len, settings.warmup) == ((0.9, 0.98), 1e-6, 256, 0.06)
    assert settings.decay_norms_and_biases
    assert settings.max_grad_norm == 0
    assert (settings.precision, plan.metrics) == (("fp32", ("spearman",)) if name == "stsb" else ("auto", ()))


def test_the_protocol_modernbert_has_the_papers_sweep():
    for name in EIGHT:
        plan = read_protocol("modernbert", []).plan_for(GLUE[name])
        assert len(plan.candidates) == 4 * 4 * 3
        assert {s.lr for s in plan.candidates} == {1e-5, 3e-5, 5e-5, 8e-5}
        assert {round(s.lr * s.torch_decay, 9) for s in plan.candidates} == {1e-6, 5e-6, 8e-6, 1e-5}
        assert {s.epochs for s in plan.candidates} == ({1, 2, 3} if name in ("sst2", "mnli", "rte") else {2, 5, 10})
        assert plan.start == ("mnli" if name in ("rte", "mrpc", "stsb") else "checkpoint")


def test_the_quickstart_scores_its_checkpoints_with_the_settings_of_its_fine_tuning():
    several, one = (read_protocol(name, []).default_plan for name in ("quickstart", "quickstart-one-seed"))
    assert several.candidates == one.candidates
    assert list(one.seeds) == list(several.seeds)[:1]


def test_every_protocol_of_the_package_can_be_read():
    assert {"mosaicbert", "modernbert", "quick", "quickstart", "quickstart-one-seed"} == set(protocol_names())
    for name in protocol_names():
        protocol = read_protocol(name, [])
        assert protocol.about
        assert protocol.default_plan.candidates


GOOD = "seeds: [1]\nsettings: {lr: 5e-5, epochs: 1, batch_size: 8}\ntasks:\n  rte: {start: mnli}\n"


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("lr:", "learning_rate:", "unknown key settings.learning_rate"),
        ("5e-5", "fast", "lr is 'fast', expected a number"),
        ("epochs: 1", "epochs: 1.5", "epochs is 1.5, expected an integer"),
        ("epochs: 1", "epochs: 0", "epochs is 0, expected a number in \\[1, 1e6\\]"),
        ("epochs: 1", "warmup: 2, epochs: 1", "warmup is 2.0, expected a number in \\[0, 1\\]"),
        ("lr: 5e-5, ", "", "lacks settings.lr"),
        ("start: mnli", "start: squad", "start is 'squad', expected checkpoint or mnli"),
        ("start: mnli", "pooling: max", "pooling is 'max', expected cls or mean"),
        ("start: mnli", "sweep: {lr: 1}", "tasks.rte.sweep.lr is 1, expected a list"),
        ("start: mnli", "metrics: [bleu]", "tasks.rte.metrics.0 is 'bleu', expected accuracy, f1,"),
        ("[1]", "[]", "seeds is \\[\\], expected a list of integers"),
        ("[1]", "[-1]", "seeds is \\[-1\\], expected a list of integers from 0"),
        ("[1]", "[true]", "seeds.0 is True, expected an integer"),
        ("[1]", "[1, 2, 1]", "seeds: 1 is listed twice"),
        ("start: mnli", "metrics: [accuracy, accuracy]", "metrics: 'accuracy' is listed twice"),
        ("5e-5", ".nan", "lr is nan, expected a finite number"),
        ("5e-5", "1e999", "lr is inf, expected a finite number"),
        ("5e-5", "1e300", "settings.lr is 1e.300, expected a number in \\(0, 10\\]"),
        ("5e-5", "-1e-5", "settings.lr is -1e-05, expected a number in"),
        ("epochs: 1", "weight_decay: -3, epochs: 1", "settings.weight_decay is -3.0, expected a number in \\[0, 100"),
        ("epochs: 1", "max_grad_norm: -1, epochs: 1", "settings.max_grad_norm is -1.0, expected a number in \\[0, 1e6"),
        ("epochs: 1", "epochs: 1000000000000", "settings.epochs is 1000000000000, expected a number in \\[1, 1e6"),
        ("batch_size: 8", "batch_size: 70000", "settings.batch_size is 70000, expected a number in \\[1, 65536"),
        ("epochs: 1", "max_seq_len: 7, epochs: 1", "settings.max_seq_len is 7, expected a number in \\[8, 1048576"),
        ("epochs: 1", "max_train_examples: -1, epochs: 1", "max_train_examples is -1, expected a number in \\[0, 1e9"),
        ("epochs: 1", "max_dev_examples: -1, epochs: 1", "max_dev_examples is -1, expected a number in \\[0, 1e9"),
        ("epochs: 1", "attention_dropout: -0.1, epochs: 1", "attention_dropout is -0.1, expected a number in \\[0, 1"),
        ("start: mnli", "sweep: {lr: [1e-5, 11]}", "tasks.rte.lr is 11.0, expected a number in \\(0, 10\\]"),
        ("epochs: 1", "weight_decay: 1, decoupled_decay: true, epochs: 1", "weight_decay is 1.0, expected less than 1"),
        ("[1]", str(list(range(1001))), "seeds has 1,001 of them, expected at most 1,000"),
        (
            "start: mnli",
            f"sweep: {{lr: {[1e-6 * n for n in range(1, 200)]}, epochs: {list(range(1, 200))}}}",
            "tasks.rte.sweep: has 39,601 combinations, expected at most 10,000",
        ),
        ("[1]", "[" * 300 + "1" + "]" * 300, "is nested 302 levels deep, expected at most 100"),
        ("epochs: 1", "beta1: 1, epochs: 1", "beta1 is 1.0, expected a number in \\[0, 1\\)"),
        ("epochs: 1", "dropout: 1, epochs: 1", "dropout is 1.0, expected a number in \\[0, 1\\)"),
        ("epochs: 1", "eps: 0, epochs: 1", "eps is 0.0, expected a number in \\[1e-30, 0.1\\]"),
        ("start: mnli", "pooling: [cls]", "pooling is \\['cls'\\], expected cls or mean"),
        ("start: mnli", "sweep:", "tasks.rte.sweep is None, expected keys and values"),
        ("start: mnli", "sweep: {lr: []}", "tasks.rte.sweep.lr is \\[\\], expected a list of values"),
        ("start: mnli", "sweep: {lrr: [1]}", "unknown key tasks.rte.sweep.lrr. Did you mean tasks.rte.sweep.lr"),
        ("start: mnli", "lrr: 1", "unknown key tasks.rte.lrr. Did you mean tasks.rte.lr"),
        ("start: mnli", "start: mnli, start: mnli", "line 4: duplicate key start"),
        ("start: mnli", "sweep: {lr: [5e-5, 5e-5]}", "tasks.rte.sweep: has a value twice"),
        ("start: mnli", "metrics: [[x]]", "metrics.0 is \\['x'\\], expected accuracy, f1,"),
        ("start: mnli", "metrics: [spearman]", "tasks.rte.metrics has spearman, expected some of accuracy"),
        ("rte:", "mnli:", "tasks.mnli.start is mnli: it cannot start from itself"),
        ("rte:", "ret:", "unknown key tasks.ret. Did you mean tasks.rte"),
        ("  rte: {start: mnli}\n", "", "tasks is None, expected keys and values"),
        ("  rte: {start: mnli}\n", "- rte\n", "tasks is \\['rte'\\], expected keys and values"),
        ("{start: mnli}", "", "tasks.rte is None, expected keys and values"),
        ("settings: {lr: 5e-5, epochs: 1, batch_size: 8}", "settings:", "settings is None, expected keys and values"),
        ("seeds", "seed", "unknown key seed. Did you mean seeds"),
        (GOOD, "[", "not valid YAML"),
        (GOOD, "text", "expected keys and values"),
    ],
)
def test_a_wrong_protocol_is_refused(tmp_path, old, new, message):
    (tmp_path / "own.yaml").write_text(GOOD.replace(old, new))
    with pytest.raises(ValueError, match=message) as error:
        read_protocol(str(tmp_path / "own.yaml"), [])
    assert "\n" not in str(error.value)
    with pytest.raises(ValueError, match="neither a file nor one of .* Did you mean mosaicbert"):
        read_protocol("mosaicbrt", [])


def test_a_protocol_may_name_the_users_own_tasks(tmp_path):
    (tmp_path / "own.yaml").write_text(GOOD.replace("rte: {start: mnli}", "own: {metrics: [f1]}"))
    own = Task(name="own", texts=("text",), labels=("a", "b"), metrics=("accuracy", "f1"))
    assert read_protocol(str(tmp_path / "own.yaml"), [own]).plan_for(own).metrics == ("f1",)
    with pytest.raises(ValueError, match="unknown key tasks.own"):
        read_protocol(str(tmp_path / "own.yaml"), [])
