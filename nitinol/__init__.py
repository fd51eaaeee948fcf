"""Nitinol: a Metal runtime for machine learning."""

__version__ = "0.1.0"
