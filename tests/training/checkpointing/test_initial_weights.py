"""Beginning a run with a folder's weights; tests/convert/test_from_hf.py trains from one."""

import pytest
import torch
from safetensors.torch import load_file

from megabert.convert.from_hf import ImportOptions, import_model
from megabert.data.shards.source import open_source
from megabert.training.checkpointing.initial_weights import load_initial_weights
from tests.convert.helpers.small_model import small_model


@pytest.fixture
def start(corpus, tmp_path):
    """A folder of ours with the corpus' tokenizer."""
    small_model().save_pretrained(tmp_path / "in")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (tmp_path / "in" / name).write_bytes((corpus.tokenizer / name).read_bytes())
    import_model(tmp_path / "in", tmp_path / "start")
    return tmp_path / "start"


def test_the_weights_are_the_folders(corpus, start):
    model = small_model(seed=1)
    load_initial_weights(model, start, open_source(str(corpus.tokens)))
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), small_model().parameters(), strict=True))


def test_another_folder_shape_or_vocabulary_is_refused(corpus, start, tmp_path):
    source = open_source(str(corpus.tokens))
    with pytest.raises(ValueError, match="not a folder of ours. Make it one with launch/convert_from_hf.py"):
        load_initial_weights(small_model(), tmp_path, source)
    with pytest.raises(ValueError, match=r"mlp.up.weight is \(80, 24\), this recipe's is \(96, 24\)"):
        load_initial_weights(small_model(intermediate_size=48), start, source)
    with pytest.raises(ValueError, match="only in one of them, such as bert.embeddings.position_embeddings.weight"):
        load_initial_weights(small_model(position="learned"), start, source)
    tokenizer = (start / "tokenizer.json").read_text()
    (start / "tokenizer.json").write_text(tokenizer.replace('"the"', '"thx"').replace('"\u2581the"', '"\u2581thx"'))
    with pytest.raises(ValueError, match="its tokenizer has '.?th[ex]' as .*, the shards' as"):
        load_initial_weights(small_model(), start, source)
    (start / "tokenizer.json").unlink()
    with pytest.raises(ValueError, match=r"has no tokenizer.json to compare"):
        load_initial_weights(small_model(), start, source)


def test_the_same_vocabulary_in_other_bytes_will_do(corpus, start):
    text = (start / "tokenizer.json").read_text()
    (start / "tokenizer.json").write_text(text + "\n")
    model = small_model(seed=1)
    load_initial_weights(model, start, open_source(str(corpus.tokens)))
    assert all(torch.equal(tensor, small_model().state_dict()[name]) for name, tensor in model.state_dict().items())


def test_a_resized_vocabulary_fits_the_corpus(corpus, start, tmp_path):
    """What convert_from_hf.py --tokenizer makes of a folder with another vocabulary."""
    small_model(vocab_size=900).save_pretrained(tmp_path / "other")
    (tmp_path / "other" / "tokenizer.json").write_bytes((corpus.tokenizer / "tokenizer.json").read_bytes())
    change = ImportOptions(tokenizer=str(corpus.tokenizer), pad_vocab_to_multiple_of=64)
    import_model(tmp_path / "other", tmp_path / "resized", change)
    model = small_model(seed=1)
    load_initial_weights(model, tmp_path / "resized", open_source(str(corpus.tokens)))
    resized = load_file(tmp_path / "resized" / "model.safetensors")
    assert all(torch.equal(model.state_dict()[name], tensor) for name, tensor in resized.items())
