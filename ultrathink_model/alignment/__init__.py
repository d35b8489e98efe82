"""Alignment: a reward model from preference pairs, and PPO, GRPO or DPO on it."""
