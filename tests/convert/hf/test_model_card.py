"""The model card: it has the run's numbers, and neither secrets nor folders of the machine."""

import json

import pytest

from megabert.config.recipe_parser import load_recipe
from megabert.convert.hf.model_card import Metrics, make_model_card, publishable, read_metrics_at
from megabert.files import checkpoint_format as layout
from megabert.training.run_schedule import ENDLESS
from tests.convert.helpers.checkpoints import write_checkpoint
from tests.convert.helpers.small_model import small_model


@pytest.mark.parametrize(
    ("written", "redacted"),
    [
        ("https://user:p%40ss@host:8080/c4/train-{00000..01023}.tar", "https://host:8080/c4/train-{00000..01023}.tar"),
        ("https://user:p@ss@host/x.tar", "https://host/x.tar"),
        ("https://token@host/x.tar?sig=abc#frag", "https://host/x.tar"),
        ("s3://bucket/x.tar?X-Amz-Signature=abc&X-Amz-Credential=def", "s3://bucket/x.tar"),
        ("https://host/path@v2/x.tar", "https://host/path@v2/x.tar"),
        ("pipe:curl -H 'Authorization: secret' https://host/x.tar", "pipe:..."),
        ("/home/someone/data/shards", "shards"),
        ("/data/train-{00..11}.tar", "train-{00..11}.tar"),
        ("~/data/shards/", "shards"),
        ("file:///home/someone/x.tar", "x.tar"),
        ("data/shards", "data/shards"),
        (["/home/a", {"shards": "https://u:p@h/x", "weight": 2}], ["a", {"shards": "https://h/x", "weight": 2}]),
        (None, None),
        (0.5, 0.5),
    ],
)
def test_settings_are_made_publishable(written, redacted):
    assert publishable(written) == redacted


def test_a_card_contains_no_secrets_and_no_folders_of_the_machine(corpus, tmp_path):
    model = small_model()
    folder = write_checkpoint(tmp_path, model, corpus.tokenizer)
    raw = json.loads((folder / "state.json").read_text())
    secret = "https://user:hunter2@host/x-{0..9}.tar?sig=topsecret"
    raw["recipe"]["data"] |= {
        "train": [{"shards": secret, "weight": 1}, {"shards": "/home/someone/x"}],
        "heldout": secret,
    }
    raw["recipe"]["data"]["train"][1]["weight"] = 2
    raw["recipe"]["run"]["output_dir"] = "/home/someone/runs/best"
    (folder / "state.json").write_text(json.dumps(raw))
    metrics = Metrics(1.0, None, None, None)
    card = str(make_model_card(model.config, layout.read_state(folder), metrics, 7, 1, 512))
    assert "https://host/x-{0..9}.tar x 1, x x 2" in card
    assert "output_dir: best" in card
    for private in ("hunter2", "topsecret", "user", "/home", "someone"):
        assert private not in card.replace("users", ""), private


@pytest.mark.parametrize(
    ("changes", "rows"),
    [
        ({}, {"steps": "2 of 2", "masking": "30%", "data": "data/quickstart/tokens"}),
        ({"masking": {"schedule": "linear"}}, {"masking": "30% to 15%, linear"}),
        ({"run": {"max_steps": None, "max_tokens": None, "max_hours": 4.6}}, {"steps": "2, in 4.5 of 4.6 hours"}),
        (
            {"data": {"phases": [{"until": 0.5}, {"until": 1.0, "train": "/data/books", "mlm_probability": 0.15}]}},
            {"masking": "30%, then 15%", "data": "data/quickstart/tokens, then books"},
        ),
    ],
)
def test_a_card_says_what_changed_over_the_run(corpus, tmp_path, changes, rows):
    model = small_model()
    folder = write_checkpoint(tmp_path, model, corpus.tokenizer)
    raw = json.loads((folder / "state.json").read_text()) | {"wall_seconds": 16_200.0}
    total = ENDLESS if "run" in changes else 2
    recipe = load_recipe("quickstart", **{"run": {"max_steps": 2}, **changes})
    (folder / "state.json").write_text(json.dumps(raw | {"total_steps": total, "recipe": recipe.to_dict()}))
    card = str(make_model_card(model.config, layout.read_state(folder), Metrics(1.0, None, None, None), 7, 1, 512))
    for name, value in rows.items():
        assert f"| {name} | {value} " in card


NEWER = '{"format_version": 2, "unigram_loss": 6.5}'


@pytest.mark.parametrize("text", ["{}", "[]", "{", '{"unigram_loss": "low"}', '{"unigram_loss": null}', NEWER])
def test_a_result_without_the_number_gives_none(tmp_path, text):
    (tmp_path / "result.json").write_text(text)
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "loss": 2.5}\n{"step": 1, "heldout_loss": "x"}\n')
    assert read_metrics_at(tmp_path, 1) == Metrics(2.5, None, None, None)
    (tmp_path / "result.json").write_text('{"unigram_loss": 6.5}')
    assert read_metrics_at(tmp_path, 1).unigram_loss == 6.5
    (tmp_path / "result.json").unlink()
    assert read_metrics_at(tmp_path, 1).unigram_loss is None
