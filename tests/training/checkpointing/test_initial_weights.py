"""Loading a folder's weights before a run; tests/convert/test_from_hf.py trains from them."""

import pytest
import torch
from safetensors.torch import load_file

from megabert.convert.from_hf import ImportOptions, import_model
from megabert.data.shards.source import open_source
from megabert.training.checkpointing.initial_weights import load_initial_weights
from tests.convert.helpers.small_model import BERT, small_model


@pytest.fixture
def start(corpus, tmp_path):
    """A MegaBERT folder with the tokenizer of the corpus."""
    small_model().save_pretrained(tmp_path / "in")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (tmp_path / "in" / name).write_bytes((corpus.tokenizer / name).read_bytes())
    import_model(tmp_path / "in", tmp_path / "start")
    # So that tests may change its files.
    (tmp_path / "start" / "import.json").unlink()
    return tmp_path / "start"


def test_the_weights_of_the_folder_are_loaded(corpus, start):
    model = small_model(seed=1)
    load_initial_weights(model, start, open_source(str(corpus.tokens)))
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), small_model().parameters(), strict=True))


def test_another_folder_shape_or_vocabulary_is_refused(corpus, start, tmp_path):
    source = open_source(str(corpus.tokens))
    with pytest.raises(ValueError, match=r"is not a MegaBERT folder. It has no config\.json"):
        load_initial_weights(small_model(), tmp_path, source)
    (tmp_path / "config.json").write_text('{"model_type": "bert"}')
    with pytest.raises(ValueError, match="is not a MegaBERT folder. Convert it with launch/convert_from_hf.py"):
        load_initial_weights(small_model(), tmp_path, source)
    (tmp_path / "run" / "checkpoints" / "step-00000004").mkdir(parents=True)
    (tmp_path / "run" / "checkpoints" / "step-00000004" / "state.json").write_text("{}")
    for path in (tmp_path / "run", tmp_path / "run" / "checkpoints" / "step-00000004"):
        with pytest.raises(ValueError, match=r"a run or a checkpoint: run.branch_from continues it, .*convert_to_hf"):
            load_initial_weights(small_model(), path, source)
    several = "Pass --model.num_hidden_layers=2 --model.intermediate_size=40.$"
    with pytest.raises(ValueError, match=f"intermediate_size is 40 in its config.json, 48 in this recipe. {several}"):
        load_initial_weights(small_model(intermediate_size=48, num_hidden_layers=3), start, source)
    with pytest.raises(
        ValueError, match=r"word_embeddings.weight has shape \(832, 24\), this recipe's has \(900, 24\)"
    ):
        load_initial_weights(small_model(vocab_size=900), start, source)
    for name, other, wanted in (
        ("position", "learned", "alibi"), ("num_hidden_layers", 3, 2), ("ffn", "gelu", "geglu"),
        ("num_attention_heads", 6, 3), ("layer_norm_eps", 1e-5, 1e-12), ("type_vocab_size", 1, 2),
    ):  # fmt: skip
        with pytest.raises(
            ValueError, match=rf"{name} is '?{wanted}'? in its config.json, .* Set model.{name} to {wanted}"
        ):
            load_initial_weights(small_model(**{name: other}), start, source)
    tokenizer = (start / "tokenizer.json").read_text()
    (start / "tokenizer.json").write_text(tokenizer.replace('"the"', '"thx"').replace('"\u2581the"', '"\u2581thx"'))
    with pytest.raises(ValueError, match="its tokenizer has '.?th[ex]' as id .*, the shards' has it as id"):
        load_initial_weights(small_model(), start, source)
    (start / "tokenizer.json").unlink()
    with pytest.raises(ValueError, match=r"has no tokenizer.json to compare"):
        load_initial_weights(small_model(), start, source)


def test_learned_positions_of_another_length_are_refused_by_their_setting(corpus, tmp_path):
    small_model(**BERT).save_pretrained(tmp_path)
    (tmp_path / "tokenizer.json").write_bytes((corpus.tokenizer / "tokenizer.json").read_bytes())
    with pytest.raises(ValueError, match="Set model.max_position_embeddings to 40, or .* --max-length"):
        load_initial_weights(small_model(**BERT, max_position_embeddings=64), tmp_path, open_source(str(corpus.tokens)))


ROBERTA = BERT | {"position_offset": 1, "type_vocab_size": 1}


@pytest.mark.parametrize(
    ("folder", "recipe", "remedy"),
    [
        (ROBERTA, BERT, "Pass --model.type_vocab_size=1 --model.position_offset=1"),
        (ROBERTA, BERT | {"type_vocab_size": 0}, "Pass --model.type_vocab_size=1 --model.position_offset=1 "
         "--model.token_types=true"),
        (BERT | {"type_vocab_size": 0}, BERT, "Set model.token_types to false"),
        (ROBERTA, ROBERTA | {"max_position_embeddings": 64}, "Set model.max_position_embeddings to 40"),
    ],
)  # fmt: skip
def test_positions_and_token_types_of_a_folder_are_named_as_the_recipes_settings(
    corpus, tmp_path, folder, recipe, remedy
):
    small_model(**folder).save_pretrained(tmp_path)
    (tmp_path / "tokenizer.json").write_bytes((corpus.tokenizer / "tokenizer.json").read_bytes())
    with pytest.raises(ValueError, match=remedy):
        load_initial_weights(small_model(**recipe), tmp_path, open_source(str(corpus.tokens)))


def test_the_same_vocabulary_in_other_bytes_is_accepted(corpus, start):
    text = (start / "tokenizer.json").read_text()
    (start / "tokenizer.json").write_text(text + "\n")
    model = small_model(seed=1)
    load_initial_weights(model, start, open_source(str(corpus.tokens)))
    assert all(torch.equal(tensor, small_model().state_dict()[name]) for name, tensor in model.state_dict().items())


def test_a_resized_vocabulary_fits_the_corpus(corpus, start, tmp_path):
    """The folder had another vocabulary and was converted with convert_from_hf.py --tokenizer."""
    small_model(vocab_size=900).save_pretrained(tmp_path / "other")
    (tmp_path / "other" / "tokenizer.json").write_bytes((corpus.tokenizer / "tokenizer.json").read_bytes())
    change = ImportOptions(tokenizer=str(corpus.tokenizer), pad_vocab_to_multiple_of=64)
    import_model(tmp_path / "other", tmp_path / "resized", change)
    model = small_model(seed=1)
    load_initial_weights(model, tmp_path / "resized", open_source(str(corpus.tokens)))
    resized = load_file(tmp_path / "resized" / "model.safetensors")
    assert all(torch.equal(model.state_dict()[name], tensor) for name, tensor in resized.items())
