"""The training engine: the loop, its optimizers and schedules, exact checkpoints, and what a stage leaves behind."""
