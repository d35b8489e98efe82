"""ULTRATHINK: from raw text to an aligned, evaluated, exported language model."""

__version__ = "0.1.0"
