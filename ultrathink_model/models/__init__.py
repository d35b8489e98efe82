"""The model: a decoder with optional experts and adaptive depth."""
