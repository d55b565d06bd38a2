"""Hybrid delta-rule and attention language models, trained on sequences longer than one device holds."""

__version__ = "0.1.0"
