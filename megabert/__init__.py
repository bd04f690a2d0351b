"""MegaBERT pretrains BERT-style encoders: MosaicBERT, and BERT as its baseline, under DeepSpeed."""

__version__ = "0.1.0"
