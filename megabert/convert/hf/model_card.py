"""Make the model card (README.md) of an exported folder from the numbers of its training run."""

import contextlib
import itertools
import re
from pathlib import Path
from typing import Any, NamedTuple

import yaml
from huggingface_hub import ModelCard, ModelCardData

from megabert.convert.hf.native import NativeKind, native_kind
from megabert.files.checkpoint_format import State
from megabert.files.metrics_format import METRICS, read_metrics
from megabert.files.redact import redact
from megabert.files.run_format import RESULT, read_run_file
from megabert.model.configuration_megabert import MegaBertConfig

# A model of the last kind is MosaicBERT with RoPE, which transformers calls GTE.
ARCHITECTURES: dict[NativeKind, str] = {
    "bert": "BERT", "roberta": "RoBERTa", "distilbert": "DistilBERT", "electra": "ELECTRA", "modernbert": "ModernBERT",
    "gte": "RoPE MosaicBERT (GTE)",
}  # fmt: skip


# The headings of what is written into a card, and found again when the folder is exported again.
TARGETS_HEADING = "## Elsewhere"
LENGTH_ROW = "maximum length of a text"


class Metrics(NamedTuple):
    """Metrics at a step, or the last before it; None if the run did not write them. Losses in nats per masked token."""

    loss: float | None
    heldout_loss: float | None
    heldout_accuracy: float | None
    unigram_loss: float | None


def read_metrics_at(run: Path, step: int) -> Metrics:
    """Read the metrics from a run's metrics.jsonl and result.json, if it has them."""
    last: dict[str, Any] = {}
    for record in read_metrics(run / METRICS):
        if record["step"] <= step:
            last |= record
    # An unfinished run has no result.json.
    with contextlib.suppress(FileNotFoundError, ValueError):
        last |= {"unigram_loss": read_run_file(run / RESULT).get("unigram_loss")}
    return Metrics(*(last[name] if isinstance(last.get(name), (int, float)) else None for name in Metrics._fields))


def publishable(value: Any) -> Any:
    """Remove what must not be public from a recipe's value.

    That is secrets of URLs, pipe: commands, and the folders of paths on this machine.
    """
    if isinstance(value, dict):
        return {name: publishable(part) for name, part in value.items()}
    if isinstance(value, list):
        return [publishable(part) for part in value]
    if not isinstance(value, str):
        return value
    if value.startswith("pipe:"):
        return "pipe:..."
    if value.startswith(("/", "~", "file:")):
        return Path(value).name
    return redact(value).removesuffix("?...").removesuffix("#...")


def make_model_card(
    config: MegaBertConfig, state: State, metrics: Metrics, num_parameters: int, average: int, max_length: int
) -> ModelCard:
    """average: number of checkpoints whose mean the weights are. max_length: at which the tokenizer truncates."""
    tags = ["megabert", config.position, config.ffn]
    metadata = ModelCardData(library_name="transformers", pipeline_tag="fill-mask", tags=tags)
    kind = native_kind(config)
    name = ARCHITECTURES[kind] if kind else "MosaicBERT" if config.position == "alibi" else "BERT"
    trust = "" if kind else ", trust_remote_code=True"
    rows = _make_rows(config, state, metrics, num_parameters, average)
    rows.append((LENGTH_ROW, _describe_length(config, state, max_length)))
    table = "\n".join(f"| {name} | {value} |" for name, value in rows)
    recipe = yaml.safe_dump(publishable(state.recipe), sort_keys=False).rstrip()
    registration = (
        "With `megabert` installed, `megabert.register_auto_classes()` makes `trust_remote_code` unnecessary.\n"
    )
    without_trust = "" if kind else registration
    return ModelCard(f"""---
{metadata.to_yaml()}
---
# A {name} encoder, {config.num_hidden_layers} layers x {config.hidden_size}

Trained with MegaBERT on masked language modelling.

| | |
|---|---|
{table}

```python
from transformers import AutoModelForMaskedLM, AutoTokenizer

tokenizer = AutoTokenizer.from_pretrained("this folder"{trust})
model = AutoModelForMaskedLM.from_pretrained("this folder"{trust})
```

{without_trust}AutoModel also works, as do AutoModelForSequenceClassification, -TokenClassification,
-MultipleChoice and -QuestionAnswering, whose heads have yet to be trained.

## Recipe

```yaml
{recipe}
```
""")


def reuse_card(card: str, max_length: int) -> str:
    """Return the card of an export for another export of it: without its targets, and with its maximum length."""
    card = re.sub(rf"\n{TARGETS_HEADING}\n.*?(?=\n## |\Z)", "", card, count=1, flags=re.DOTALL)
    row = re.search(rf"^\| {LENGTH_ROW} \| (\S+) tokens, .*$", card, flags=re.MULTILINE)
    if row is None or row[1] == f"{max_length:,}":
        return card
    return card.replace(row[0], f"| {LENGTH_ROW} | {max_length:,} tokens, at which the tokenizer truncates |")


def _make_rows(
    config: MegaBertConfig, state: State, metrics: Metrics, num_parameters: int, average: int
) -> list[tuple[str, Any]]:
    rows: list[tuple[str, Any]] = [
        ("parameters", f"{num_parameters:,}"),
        ("attention heads, MLP width", f"{config.num_attention_heads}, {config.intermediate_size}"),
        ("positions, MLP", f"{config.position}, {config.ffn}"),
        ("vocabulary", f"{config.vocab_size:,} rows"),
        ("data", f"{_describe_data(state)} (fingerprint {state.corpus[:12]})"),
        ("tokens seen", f"{state.tokens:,}"),
        ("steps", _describe_steps(state)),
        ("longest text in training", f"{state.max_seq_len} tokens"),
        ("masking", _describe_masking(state)),
        ("seed", state.recipe["run"]["seed"]),
        ("training time", f"{state.seconds:,.0f} s on {state.world_size} ranks"),
        ("training loss", _format_nats(metrics.loss)),
        ("held-out loss", _format_nats(metrics.heldout_loss)),
        ("held-out loss of guessing by token frequency", _format_nats(metrics.unigram_loss)),
        ("held-out masked tokens predicted", metrics.heldout_accuracy and f"{metrics.heldout_accuracy:.1%}"),
    ]
    if average > 1:
        rows.append(("weights", f"the mean of {average} checkpoints, the last of which is that of this step"))
    return [(name, value) for name, value in rows if value is not None]


def _describe_length(config: MegaBertConfig, state: State, max_length: int) -> str:
    text = f"{max_length:,} tokens, at which the tokenizer truncates"
    if config.position == "alibi" and max_length > state.max_seq_len:
        text += "; the model has not been trained on texts that long, but ALiBi has no longest text"
    return text


def _describe_data(state: State) -> str:
    """Name the corpora of each phase that has its own, in order."""
    data = state.recipe["data"]
    mixtures = publishable([phase["train"] or data["train"] for phase in data.get("phases") or ()] or [data["train"]])
    names = [
        train if isinstance(train, str) else ", ".join(f"{part['shards']} x {part['weight']}" for part in train)
        for train in mixtures
    ]
    return ", then ".join(name for name, _ in itertools.groupby(names))


def _describe_steps(state: State) -> str:
    """Return the steps of a run, and its length: also in hours, if the clock ends it."""
    hours = state.recipe["run"].get("max_hours")
    if hours is None:
        return f"{state.step:,} of {state.total_steps:,}"
    return f"{state.step:,}, in {state.wall_seconds / 3600:.3g} of {hours:g} hours"


def _describe_masking(state: State) -> str:
    """Return the masking rate, or those of a schedule or of the phases."""
    masking = state.recipe["masking"]
    first, schedule = masking["mlm_probability"], masking.get("schedule", "constant")
    if schedule != "constant":
        return f"{first:.0%} to {masking['final_mlm_probability']:.0%}, {schedule}"
    phases = state.recipe["data"].get("phases") or [{}]
    rates = [f"{phase.get('mlm_probability') or first:.0%}" for phase in phases]
    return ", then ".join(rate for rate, _ in itertools.groupby(rates))


def _format_nats(value: float | None) -> str | None:
    return None if value is None else f"{value:.3f} nats per masked token"
