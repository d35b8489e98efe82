"""Ranks: how they are started, how they talk, and the strategies by which they share a model's training."""
