"""Tell which head a model has: that of masked language modelling, or one for a task."""

from collections.abc import Collection
from pathlib import Path
from typing import Any

from megabert.convert.hf.reader import CONFIG
from megabert.model import modeling_megabert
from megabert.model.configuration_megabert import MegaBertConfig

MASKED_LM = "MaskedLM"
ANSWERS, CHOICE = "QuestionAnswering", "MultipleChoice"
TASKS = ("SequenceClassification", "TokenClassification", ANSWERS, CHOICE)
# What the classes of each architecture begin with.
PREFIXES = {
    "megabert": ("MegaBert",),
    "bert": ("Bert",),
    "mosaicbert": ("Bert",),
    "roberta": ("Roberta", "XLMRoberta", "Camembert"),
    "distilbert": ("DistilBert",),
    "electra": ("Electra",),
    "modernbert": ("ModernBert",),
    "gte": ("Gte",),
}
LAST_LAYERS = ("classifier.weight", "classifier.out_proj.weight", "qa_outputs.weight")
# Settings that belong to the head for a task.
LABELS = ("id2label", "label2id", "problem_type")


def read_head(source: Path, raw: dict[str, Any], kind: str, names: Collection[str]) -> str | None:
    """Return the task, one of TASKS, whose class config.json names, or None.

    names: of the tensors. Raises ValueError if the tensors have a head that is not the class's, or if our class of it
    computes something else.
    """
    classes = {f"{prefix}For{task}": task for prefix in PREFIXES[kind] for task in TASKS}
    architectures = set(raw.get("architectures") or [])
    named = next((name for name in sorted(architectures) if name in classes), None)
    has_head = any(name in names for name in LAST_LAYERS)
    if named is None:
        # In other architectures, each head is known by the names of its tensors.
        bare = {f"{prefix}{end}" for prefix in PREFIXES[kind] for end in ("Model", "ForMaskedLM")}
        if has_head and kind in ("modernbert", "gte") and architectures <= bare:
            raise ValueError(
                f"{source}: has a classifier, but {CONFIG} does not name its class. Set architectures there to "
                f"[{', '.join(repr(name) for name in list(classes)[:2])} or another of its classes]."
            )
        return None
    if not has_head:
        raise ValueError(
            f"{source}: is a {named} in its {CONFIG}, but its weights have no {LAST_LAYERS[0]}. Copy the weights "
            "again, or if they are those of an encoder alone, remove architectures there."
        )
    if kind == "modernbert" and classes[named] == CHOICE and raw.get("classifier_pooling", "cls") != "cls":
        raise ValueError(
            f"{source / CONFIG}: classifier_pooling is {raw['classifier_pooling']!r}; this model's {classes[named]} "
            "supports only 'cls'."
        )
    return classes[named]


def head_of(config: MegaBertConfig) -> str:
    """Return the head of our model with this config."""
    named = (config.architectures or [""])[0].removeprefix("MegaBertFor")
    return named if named in TASKS else MASKED_LM


def class_of(config: MegaBertConfig) -> type[modeling_megabert.MegaBertPreTrainedModel]:
    """Return our class with the config's head."""
    return getattr(modeling_megabert, f"MegaBertFor{head_of(config)}")
