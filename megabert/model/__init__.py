"""This package holds the encoder. Importing it registers the encoder with transformers' Auto classes.

An exported folder contains the other files of this folder, not this one.
"""


def register_auto_classes() -> None:
    """Let AutoConfig, AutoModel and the AutoModel class of each head load MegaBERT without trust_remote_code.

    Repeated calls change nothing.
    """
    from transformers import AutoConfig
    from transformers.models.auto import modeling_auto as auto

    from . import modeling_megabert as modeling
    from .configuration_megabert import MegaBertConfig

    AutoConfig.register(MegaBertConfig.model_type, MegaBertConfig, exist_ok=True)
    auto.AutoModel.register(MegaBertConfig, modeling.MegaBertModel, exist_ok=True)
    heads = ("MaskedLM", "SequenceClassification", "MultipleChoice", "TokenClassification", "QuestionAnswering")
    for head in heads:
        auto_class, ours = getattr(auto, f"AutoModelFor{head}"), getattr(modeling, f"MegaBertFor{head}")
        auto_class.register(MegaBertConfig, ours, exist_ok=True)


register_auto_classes()
