"""What a run will need, reckoned from its config alone, without torch: parameters, work, memory, time and money."""

from ultrathink_model.planning.plan import Plan, make_plan

__all__ = ["Plan", "make_plan"]
