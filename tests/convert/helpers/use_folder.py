"""Use an exported folder in every way that a transformers user does. Runs as a program, under any version:

python tests/convert/helpers/use_folder.py FOLDER --scratch SCRATCH [--with-megabert] [--all]

Without --with-megabert it cannot import megabert and loads with trust_remote_code. --all also runs what needs
accelerate (Trainer) and sentence-transformers. Prints one line of JSON; an assertion that fails is the error.
"""

import argparse
import json
import sys
from pathlib import Path
from typing import Any

TEXTS = ["a tensor of zeros", "Returns the learning rate of each parameter group, as a list of floats."]


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("folder", type=Path)
    parser.add_argument("--scratch", type=Path, required=True)
    parser.add_argument("--with-megabert", action="store_true")
    parser.add_argument("--all", action="store_true")
    options = parser.parse_args()
    load: dict[str, Any] = {}
    if options.with_megabert:
        import megabert

        megabert.register_auto_classes()
    else:
        sys.modules["megabert"] = None  # type: ignore[assignment]
        load = {"trust_remote_code": True}
    import transformers

    transformers.logging.set_verbosity_error()
    done: dict[str, object] = {"transformers": transformers.__version__}
    done["classes"] = check_auto_classes(options.folder, load)
    check_attention_implementations(options.folder, load)
    done["pipelines"] = check_pipelines(options.folder, load)
    check_recomputed_gradients(options.folder, load)
    check_exported_graph(options.folder, load)
    check_saving_again(options.folder, options.scratch / "again", load)
    if options.all:
        done["loss"] = check_trainer(options.folder, options.scratch, load)
        done["best"] = check_best_model(options.folder, options.scratch, load)
        done["sentence_transformers"] = check_sentence_transformers(options.folder, load)
    sys.stdout.write(json.dumps(done) + "\n")


def load_tokenizer(folder: Path, load: dict):
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder, **load)
    assert tokenizer is not None
    return tokenizer


def tokenize(folder: Path, load: dict):
    return load_tokenizer(folder, load)(TEXTS, return_tensors="pt", padding=True)


def check_auto_classes(folder: Path, load: dict) -> list[str]:
    import transformers

    names = []
    heads = ("MaskedLM", "SequenceClassification", "MultipleChoice", "TokenClassification", "QuestionAnswering")
    for head in ("", *(f"For{head}" for head in heads)):
        model = getattr(transformers, f"AutoModel{head}").from_pretrained(folder, **load).eval()
        inputs = tokenize(folder, load)
        # Two choices of one question.
        if head == "ForMultipleChoice":
            inputs = {name: values[None] for name, values in inputs.items()}
        output = model(**inputs)
        assert all(value.isfinite().all() for value in output.values()), head
        assert type(model).__module__.startswith("megabert.") == (not load and "MegaBert" in type(model).__name__)
        names.append(type(model).__name__)
    return names


def check_attention_implementations(folder: Path, load: dict) -> None:
    """eager and sdpa agree; flash_attention_2 is passed on, and its error names what is missing where it cannot run."""
    import torch
    from transformers import AutoModelForMaskedLM

    inputs, logits = tokenize(folder, load), []
    for name in ("eager", "sdpa"):
        model = AutoModelForMaskedLM.from_pretrained(folder, attn_implementation=name, **load).eval()
        assert model.config._attn_implementation == name
        with torch.no_grad():
            logits.append(model(**inputs).logits[inputs["attention_mask"].bool()])
    torch.testing.assert_close(*logits, rtol=0, atol=1e-5)
    try:
        AutoModelForMaskedLM.from_pretrained(folder, attn_implementation="flash_attention_2", **load)
    except (ImportError, ValueError) as error:
        message = str(error)
    else:
        message = "flash"
        assert torch.cuda.is_available(), "flash-attn without a GPU"
    assert "flash" in message.lower(), message


def check_pipelines(folder: Path, load: dict) -> list[int]:
    from transformers import pipeline

    filled = pipeline("fill-mask", model=str(folder), **load)("the [MASK] of the module")
    label = pipeline("text-classification", model=str(folder), **load)(TEXTS[0])
    features = pipeline("feature-extraction", model=str(folder), **load)(TEXTS[0])
    return [len(filled), len(label), len(features[0])]


def check_recomputed_gradients(folder: Path, load: dict) -> None:
    import torch
    from transformers import AutoModelForMaskedLM

    model = AutoModelForMaskedLM.from_pretrained(folder, **load).train()
    inputs = tokenize(folder, load)
    gradients, calls = [], 0

    def count(*_) -> None:
        nonlocal calls
        calls += 1

    # Transformers' own BERT is not tested.
    is_megabert = "MegaBert" in type(model).__name__
    if is_megabert:
        model.bert.encoder.layers[0].register_forward_pre_hook(count)
    for recompute in (False, True):
        if recompute:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
            assert model.is_gradient_checkpointing
        calls = 0
        model.zero_grad()
        # Dropout.
        torch.manual_seed(0)
        model(**inputs, labels=inputs["input_ids"]).loss.backward()
        assert calls == is_megabert * (1 + recompute)
        gradients.append([p.grad.clone() for p in model.parameters() if p.grad is not None])
    for first, second in zip(*gradients, strict=True):
        torch.testing.assert_close(first, second, rtol=0, atol=1e-6)


def check_exported_graph(folder: Path, load: dict) -> None:
    """torch.export, for any batch size and length; transformers' own BERT is not tested."""
    import torch
    from transformers import AutoModelForMaskedLM

    model, inputs = AutoModelForMaskedLM.from_pretrained(folder, **load).eval(), tokenize(folder, load)
    if "MegaBert" not in type(model).__name__:
        return
    sizes = {0: torch.export.Dim.DYNAMIC, 1: torch.export.Dim.DYNAMIC}
    example = {name: torch.ones(3, 5, dtype=torch.int64) for name in ("input_ids", "attention_mask")}
    graph = torch.export.export(model, (), example, dynamic_shapes=dict.fromkeys(example, sizes)).module()
    inputs = {name: inputs[name] for name in example}
    real = inputs["attention_mask"].bool()
    with torch.no_grad():
        torch.testing.assert_close(graph(**inputs).logits[real], model(**inputs).logits[real], rtol=0, atol=1e-5)


def check_saving_again(folder: Path, again: Path, load: dict) -> None:
    import torch
    from transformers import AutoModelForMaskedLM

    model = AutoModelForMaskedLM.from_pretrained(folder, **load).eval()
    model.save_pretrained(again)
    load_tokenizer(folder, load).save_pretrained(again)
    reloaded = AutoModelForMaskedLM.from_pretrained(again, **load).eval()
    with torch.no_grad():
        assert torch.equal(model(**tokenize(folder, load)).logits, reloaded(**tokenize(again, load)).logits)


def check_trainer(folder: Path, scratch: Path, load: dict) -> float:
    import torch
    from transformers import AutoModelForSequenceClassification, DataCollatorWithPadding, Trainer, TrainingArguments

    tokenizer = load_tokenizer(folder, load)
    examples = [{**tokenizer(TEXTS[i % 2]), "labels": i % 2} for i in range(8)]
    model = AutoModelForSequenceClassification.from_pretrained(folder, num_labels=2, **load)
    settings = TrainingArguments(
        str(scratch / "trainer"), max_steps=30, learning_rate=1e-3, per_device_train_batch_size=4, report_to=[],
        save_strategy="no", use_cpu=True, gradient_checkpointing=True, disable_tqdm=True,
    )  # fmt: skip
    training = Trainer(model, settings, DataCollatorWithPadding(tokenizer), examples, examples)
    before = training.evaluate()["eval_loss"]
    training.train()
    after = training.evaluate()["eval_loss"]
    assert after < before, (before, after)

    def gradient_norm(batch: int, batches: int) -> float:
        off = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0, "classifier_dropout": 0.0}
        torch.manual_seed(0)
        model = AutoModelForSequenceClassification.from_pretrained(folder, num_labels=2, **off, **load)
        settings = TrainingArguments(
            str(scratch / "trainer"), max_steps=1, per_device_train_batch_size=batch,
            gradient_accumulation_steps=batches, report_to=[], save_strategy="no", use_cpu=True, logging_steps=1,
            disable_tqdm=True,
        )  # fmt: skip
        training = Trainer(model, settings, DataCollatorWithPadding(tokenizer), examples)
        training.train()
        return next(line["grad_norm"] for line in training.state.log_history if "grad_norm" in line)

    # Gradient accumulation must not change the gradients. transformers 5.23's own BERT sums those of micro-batches.
    if "MegaBert" in type(model).__name__:
        whole, parts = gradient_norm(8, 1), gradient_norm(2, 4)
        assert abs(whole - parts) < 1e-3 * whole, (whole, parts)
    return after


def check_best_model(folder: Path, scratch: Path, load: dict) -> float:
    """Masked language modelling in Trainer: each evaluation has a loss, and the model with the lowest is loaded."""
    from transformers import AutoModelForMaskedLM, Trainer, TrainingArguments

    tokenizer = load_tokenizer(folder, load)
    rows = [tokenizer(text, padding="max_length", max_length=24, truncation=True) for text in TEXTS * 2]
    examples = [{**row, "labels": row["input_ids"]} for row in rows]
    model = AutoModelForMaskedLM.from_pretrained(folder, **load)
    settings = TrainingArguments(
        str(scratch / "best"), max_steps=4, per_device_train_batch_size=2, report_to=[], use_cpu=True, seed=3,
        save_strategy="steps", save_steps=2, eval_strategy="steps", eval_steps=2, load_best_model_at_end=True,
        metric_for_best_model="eval_loss", disable_tqdm=True,
    )  # fmt: skip
    training = Trainer(model, settings, train_dataset=examples, eval_dataset=examples)
    training.train()
    losses = [line["eval_loss"] for line in training.state.log_history if "eval_loss" in line]
    assert len(losses) == 2
    assert training.state.best_metric == min(losses)
    again = training.evaluate()["eval_loss"]
    assert abs(again - min(losses)) < 1e-4, (again, losses)
    return again


def check_sentence_transformers(folder: Path, load: dict) -> str:
    import sentence_transformers as library  # type: ignore[import-not-found]

    vectors = library.SentenceTransformer(str(folder), device="cpu", **load).encode(TEXTS)
    assert vectors.shape[0] == 2
    assert (vectors[0] != vectors[1]).any()
    return library.__version__


if __name__ == "__main__":
    main()
