"""Export each task's best fine-tuned model as a Hugging Face folder with the names of its labels."""

import json
from copy import deepcopy
from pathlib import Path

import torch

from megabert.convert.check import export_check, export_record
from megabert.convert.check.export_record import Measurements
from megabert.convert.hf.native import native_class
from megabert.convert.hf.tokenizer import copy_tokenizer
from megabert.convert.hf.writer import MAX_SHARD_SIZE, MODEL_CODE
from megabert.convert.to_hf import check_replaceable, write_model
from megabert.data.shards.manifest import TOKENIZER, TOKENIZER_CONFIG
from megabert.files.atomic import replace_folder, staged_folder
from megabert.files.hashing import texts_sha256
from megabert.files.json_file import read_json, write_json
from megabert.finetune.base_model import load_model
from megabert.finetune.jobs.job import FinetuneJob, JobContext, has_token_types, tokenizer_for
from megabert.finetune.jobs.runner import Result, kept_model_is_intact
from megabert.finetune.tasks.task import Task
from megabert.finetune.training import Backend
from megabert.model.configuration_megabert import MegaBertConfig
from megabert.model.modeling_megabert import MegaBertForSequenceClassification

CARD = """---
library_name: transformers
pipeline_tag: text-classification
tags: [megabert]
---
# A model for {task}

{about}

| | |
|---|---|
| labels | {labels} |
| a text is | {texts} |
| chosen | {chosen} |
| scores on the evaluation sets | {scores} |
| training examples | {examples:,} |
| settings | {settings} |

```python
from transformers import AutoModelForSequenceClassification, AutoTokenizer

tokenizer = AutoTokenizer.from_pretrained("this folder"{trust})
model = AutoModelForSequenceClassification.from_pretrained("this folder"{trust})
inputs = tokenizer({arguments}, truncation=True, return_tensors="pt")
print(model(**inputs).logits)
```
"""


def model_folder(out: Path, task: Task) -> Path:
    return out / "models" / task.name


def check_model_folders(out: Path, tasks: list[Task]) -> None:
    """Raise ValueError, before any training, if a folder where a model will be written holds anything else."""
    for folder in (model_folder(out, task) for task in tasks if task.dev):
        check_replaceable(folder, export_record.read_record(folder))


def is_exportable(context: JobContext, job: FinetuneJob, result: Result) -> bool:
    """Return whether a job's model is exported already, or was kept so that it can be."""
    return (
        not job.is_exported
        or read_export(context, job, result) is not None
        or kept_model_is_intact(context.jobs / job.name, result)
    )


def read_export(context: JobContext, job: FinetuneJob, result: Result) -> Measurements | None:
    """Return what the check of an earlier export of this very model measured, if every file is unchanged."""
    folder = model_folder(context.out, job.task)
    record = export_record.read_record(folder)
    if record is None or record["checkpoint"] != _fingerprint(job, result) or export_record.find_change(folder, record):
        return None
    return record.get("measured")


def export_model(context: JobContext, job: FinetuneJob, result: Result, num_jobs: int) -> Measurements:
    """Export a job's kept model, or reuse an unchanged export of it. num_jobs: how many it is the best of.

    Returns what the check measured, in a process without megabert. Raises ValueError if the check fails.
    """
    if (measured := read_export(context, job, result)) is not None:
        return measured
    out, kept = model_folder(context.out, job.task), context.jobs / job.name
    check_replaceable(out, export_record.read_record(out))
    model = load_model(kept, job.task, job.settings, Backend(torch.device("cpu"), "torch")).eval()
    pairs = len(job.task.texts) == 2
    with staged_folder(out) as folder:
        max_length = _write_tokenizer(folder, kept, model, job)
        config = _with_labels(model, job.task)
        weights = {name: tensor.detach().contiguous() for name, tensor in model.state_dict().items()}
        parameters = write_model(folder, weights, config, MAX_SHARD_SIZE)
        export_check.write_expected_outputs(model, folder, folder, max_length, pairs)
        (folder / "README.md").write_text(_make_card(native_class(config), job, result, num_jobs), encoding="utf-8")
        export_record.write_export_record(folder, _fingerprint(job, result), max_length, parameters, pairs)
        measured = export_check.check_new_export(folder, str(out))
        replace_folder(folder, out, lambda: check_replaceable(out, export_record.read_record(out)))
    return measured


def _fingerprint(job: FinetuneJob, result: Result) -> str:
    """Hash everything that determines an export: the model, the task, the settings and the code."""
    convert = Path(export_check.__file__).parents[1]
    code = [Path(__file__), *sorted(MODEL_CODE.glob("*.py")), *sorted(convert.rglob("*.py"))]
    parts = [
        json.dumps([result.get("model"), job.identity], sort_keys=True),
        *(path.read_text(encoding="utf-8") for path in code),
    ]
    return texts_sha256(parts)


def _write_tokenizer(folder: Path, kept: Path, model: MegaBertForSequenceClassification, job: FinetuneJob) -> int:
    """Write the tokenizer as fine-tuning used it: with its special tokens around texts and pairs, and its length."""
    tokenizer = tokenizer_for(model, kept, job.settings)
    assert tokenizer.truncation is not None, f"{kept}: the tokenizer does not truncate texts"
    max_length = tokenizer.truncation["max_length"]
    copy_tokenizer(kept, folder, max_length)
    tokenizer.no_truncation()
    (folder / TOKENIZER).write_text(tokenizer.to_str(pretty=True), encoding="utf-8")
    path = folder / TOKENIZER_CONFIG
    types = ["token_type_ids"] if has_token_types(model) else []
    settings = read_json(path) | {"model_input_names": ["input_ids", *types, "attention_mask"]}
    write_json(path, settings)
    return max_length


def _with_labels(model: MegaBertForSequenceClassification, task: Task) -> MegaBertConfig:
    """Return the model's config with the names of the task's labels, and the model's class."""
    config = deepcopy(model.config)
    config.id2label = dict(enumerate(task.labels or [task.label]))
    config.label2id = {name: number for number, name in config.id2label.items()}
    config.problem_type = "regression" if task.is_regression else "single_label_classification"
    config.architectures = [type(model).__name__]
    return config


def _make_card(native: str | None, job: FinetuneJob, result: Result, num_jobs: int) -> str:
    """native: the class of transformers that loads the folder without its code, or None."""
    task, pairs = job.task, len(job.task.texts) == 2
    runs = f"the best of {num_jobs} runs" if num_jobs > 1 else "the only run"
    return CARD.format(
        task=task.name,
        about="A regression." if task.is_regression else f"A classifier with {len(task.labels)} labels.",
        labels=", ".join(task.labels) or f"none: a number, {task.label}",
        texts=" and ".join(task.texts),
        chosen=f"{runs} by the score on the evaluation sets; seed {job.seed}",
        scores=", ".join(f"{name} {100 * value:.2f}" for name, value in result["scores"].items()),
        examples=result["train_examples"],
        settings=", ".join(f"{name} {value}" for name, value in job.identity["settings"].items()),
        trust="" if native else ", trust_remote_code=True",
        arguments='"a text", "another text"' if pairs else '"a text"',
    )
