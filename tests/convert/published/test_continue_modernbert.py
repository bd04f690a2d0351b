"""The walk of megabert/recipes/README.md: from texts and a ModernBERT of transformers to an export that it loads."""

import sys

import pytest
import torch
from transformers import AutoModelForMaskedLM, ModernBertConfig, ModernBertForMaskedLM

from tests.convert.helpers.auto_tokenizer import load_auto_tokenizer
from tests.helpers.foreign.gemma_tokenizer import write_gemma_tokenizer
from tests.helpers.foreign.named_tokenizers import OWN, write_large_tokenizer, write_named_tokenizer
from tests.helpers.foreign.sentencepiece_models import lines_of_every_script
from tests.helpers.runs import Corpus, run_command

SHAPE = {
    "num_hidden_layers": 4, "hidden_size": 64, "num_attention_heads": 4, "intermediate_size": 96,
    "local_attention_window": 32, "pad_vocab_to_multiple_of": 32,
}  # fmt: skip
RUN = ["--data.max_seq_len=128", "--data.micro_batch_tokens=1024", "--data.global_batch_tokens=2048"]
RUN += ["--data.num_workers=0", "--run.max_steps=4", "--run.eval_tokens=2048", "--run.ops=torch"]


def run(script: str, *arguments: object) -> str:
    done = run_command([sys.executable, script, *map(str, arguments)])
    assert done.code == 0, done.output
    return done.output


def save_modernbert(tokenizer_folder, out) -> None:
    """Write what a published folder has: transformers' own model with random weights, and its tokenizer."""
    tokenizer = load_auto_tokenizer(tokenizer_folder)
    ids = {f"{name}_token_id": getattr(tokenizer, f"{name}_token_id") for name in ("pad", "cls", "sep")}
    shape = {
        name: SHAPE[name] for name in ("num_hidden_layers", "hidden_size", "num_attention_heads", "intermediate_size")
    }
    config = ModernBertConfig(
        vocab_size=len(tokenizer), max_position_embeddings=256, local_attention=SHAPE["local_attention_window"],
        bos_token_id=ids["cls_token_id"], eos_token_id=ids["sep_token_id"], **shape, **ids,
    )  # fmt: skip
    ModernBertForMaskedLM(config).save_pretrained(out)
    tokenizer.save_pretrained(out)


@pytest.mark.nightly
@pytest.mark.parametrize("kind", ["byte_bpe", "gemma", "own", "large"])
def test_a_modernbert_is_continued_on_texts_and_exported(kind, corpus: Corpus, tmp_path):
    bpe, published, imported = tmp_path / "bpe", tmp_path / "published", tmp_path / "imported"
    tokenizer, tokens, out = tmp_path / "tokenizer", tmp_path / "tokens", tmp_path / "out"
    prep = "data_prep/train_tokenizer.py"
    if kind == "gemma":
        write_gemma_tokenizer(bpe, corpus.texts)
    elif kind == "own":
        write_named_tokenizer(bpe, OWN, corpus.texts)
    elif kind == "large":
        # As many pieces as mmBERT has: ids need more than 16 bits.
        write_large_tokenizer(bpe, corpus.texts, 256_000)
    else:
        run(prep, "--source", corpus.jsonl, "--model", "byte_bpe", "--vocab_size", 800, "--out", bpe)
    save_modernbert(bpe, published)
    run(prep, "--existing", published, "--out", tokenizer)
    run(
        "data_prep/write_shards.py", "--source", corpus.jsonl, "--tokenizer", tokenizer, "--out", tokens,
        "--heldout", 0.05, "--chunk_tokens", 2048,
    )  # fmt: skip
    run("launch/convert_from_hf.py", published, imported)
    model = [f"--model.{name}={value}" for name, value in SHAPE.items()]
    flags = [f"--data.train={tokens}", f"--run.output_dir={tmp_path / 'run'}", f"--model.init_from={imported}"]
    command = ["--ds_config=ds_configs/zero2.json", "--recipe=modernbert-continue", *flags, *model, *RUN]
    assert "step 4: saved" in run("launch/pretrain.py", *command)
    assert "loads in transformers" in run("launch/convert_to_hf.py", tmp_path / "run", out)
    run("launch/convert_to_hf.py", "--verify-only", out)
    loaded = AutoModelForMaskedLM.from_pretrained(out)
    assert type(loaded) is ModernBertForMaskedLM
    before = ModernBertForMaskedLM.from_pretrained(published).state_dict()
    changes = [(weight - before[name]).abs().max() for name, weight in loaded.state_dict().items()]
    texts = [*lines_of_every_script(), *corpus.texts]
    theirs, ours = load_auto_tokenizer(published), load_auto_tokenizer(out)
    assert ours(texts)["input_ids"] == theirs(texts)["input_ids"]
    for role in ("pad", "unk", "mask", *(("cls", "sep") if theirs.cls_token else ())):
        assert getattr(ours, f"{role}_token_id") == getattr(theirs, f"{role}_token_id")
        assert kind == "own" or getattr(ours, f"{role}_token") == getattr(theirs, f"{role}_token")
    assert 0 < torch.stack(changes).max() < 0.1, "it was continued, not begun anew"
