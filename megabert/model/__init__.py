"""The encoder. Importing this imports nothing; the two functions make transformers' Auto classes know it.

An exported folder carries the other files of this one, not this.
"""


def register_config() -> None:
    """Let AutoConfig read a config.json of type megabert without trust_remote_code."""
    from transformers import AutoConfig

    from .configuration_megabert import MegaBertConfig

    AutoConfig.register(MegaBertConfig.model_type, MegaBertConfig, exist_ok=True)


def register_models() -> None:
    """Let AutoModel and its four kin for our heads build one."""
    from transformers.models.auto import modeling_auto as auto

    from . import modeling_megabert as modeling
    from .configuration_megabert import MegaBertConfig

    for head in ("ForMaskedLM", "ForSequenceClassification", "ForTokenClassification", "ForQuestionAnswering"):
        getattr(auto, f"AutoModel{head}").register(MegaBertConfig, getattr(modeling, f"MegaBert{head}"), exist_ok=True)
    auto.AutoModel.register(MegaBertConfig, modeling.MegaBertModel, exist_ok=True)
