"""The README.md of an exported folder: what the model is, how it was trained, and how to use it, from the run's own numbers."""

import contextlib
import re
from pathlib import Path
from typing import Any, NamedTuple

import yaml

from megabert.convert.hf.reading import read_json
from megabert.files.checkpoint_format import State
from megabert.files.metrics_format import METRICS, read_metrics
from megabert.model.configuration_megabert import MegaBertConfig


class Numbers(NamedTuple):
    """Of the checkpoint's step or the last before it; None where the run did not write them. In nats per masked token."""

    loss: float | None
    heldout_loss: float | None
    heldout_accuracy: float | None
    unigram_loss: float | None


def read_numbers(run: Path, step: int) -> Numbers:
    """From a run's metrics.jsonl and result.json, where it has them."""
    last: dict[str, Any] = {}
    result = run / "result.json"
    for record in read_metrics(run / METRICS):
        if record["step"] <= step:
            last |= record
    with contextlib.suppress(ValueError):  # one that was never finished tells nothing
        last |= {"unigram_loss": read_json(result).get("unigram_loss")}
    return Numbers(*(last[name] if isinstance(last.get(name), (int, float)) else None for name in Numbers._fields))


# A URL: its scheme, who asks for it with which password, its host and path, and what is asked, which may be a signature.
URL = re.compile(r"([a-zA-Z][\w+.-]*)://(?:[^/\s]*@)?([^\s?#]*)(?:[?#]\S*)?")


def public(value: Any) -> Any:
    """A recipe's value as anybody may read it: no passwords, no signed queries, no commands, of paths on this machine the name."""
    if isinstance(value, dict):
        return {name: public(part) for name, part in value.items()}
    if isinstance(value, list):
        return [public(part) for part in value]
    if not isinstance(value, str):
        return value
    if value.startswith("pipe:"):
        return "pipe:..."
    if value.startswith(("/", "~", "file:")):
        return Path(value).name
    return URL.sub(r"\1://\2", value)


def model_card(
    config: MegaBertConfig, state: State, numbers: Numbers, num_parameters: int, native: bool, average: int
) -> str:
    """native: loads as transformers' own BERT; average: of how many checkpoints the weights are the mean."""
    name = "MosaicBERT" if config.position == "alibi" else "BERT"
    trust = "" if native else ", trust_remote_code=True"
    rows = _rows(config, state, numbers, num_parameters, average)
    table = "\n".join(f"| {name} | {value} |" for name, value in rows)
    recipe = yaml.safe_dump(public(state.recipe), sort_keys=False).rstrip()
    ours = "" if native else "Where `megabert` is installed, `megabert.register_auto_classes()` makes `trust_remote_code` needless.\n"
    return f"""---
library_name: transformers
pipeline_tag: fill-mask
tags: [megabert, {config.position}, {config.ffn}]
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

{ours}Also AutoModel, and AutoModelForSequenceClassification, -TokenClassification, -QuestionAnswering, whose heads are to be trained.

## Recipe

```yaml
{recipe}
```
"""


def _rows(
    config: MegaBertConfig, state: State, numbers: Numbers, num_parameters: int, average: int
) -> list[tuple[str, Any]]:
    masking = state.recipe["masking"]
    rows: list[tuple[str, Any]] = [
        ("parameters", f"{num_parameters:,}"),
        ("attention heads, MLP width", f"{config.num_attention_heads}, {config.intermediate_size}"),
        ("positions, MLP", f"{config.position}, {config.ffn}"),
        ("vocabulary", f"{config.vocab_size:,} rows"),
        ("data", f"{_data(state)} (sha256 of its manifest {state.corpus[:12]})"),
        ("tokens seen", f"{state.tokens:,}"),
        ("steps", f"{state.step:,} of {state.total_steps:,}"),
        ("longest piece of a text", f"{state.max_seq_len} tokens"),
        ("masking", f"{masking['mlm_probability']:.0%}"),
        ("seed", state.recipe["run"]["seed"]),
        ("training time", f"{state.seconds:,.0f} s on {state.world_size} ranks"),
        ("training loss", _nats(numbers.loss)),
        ("held-out loss", _nats(numbers.heldout_loss)),
        ("held-out loss of guessing by frequency", _nats(numbers.unigram_loss)),
        ("held-out masked tokens predicted", numbers.heldout_accuracy and f"{numbers.heldout_accuracy:.1%}"),
    ]
    if average > 1:
        rows.append(("weights", f"the mean of {average} checkpoints, the last of them of this step"))
    return [(name, value) for name, value in rows if value is not None]


def _data(state: State) -> str:
    train = public(state.recipe["data"]["train"])
    return train if isinstance(train, str) else ", ".join(f"{part['shards']} x {part['weight']}" for part in train)


def _nats(value: float | None) -> str | None:
    return None if value is None else f"{value:.3f} nats per masked token"
