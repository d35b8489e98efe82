"""Finished models for others to use: verified copies, and the cards that describe them."""
