"""Scheduling loops: which cells run next (planner) and running a step's passes (executor)."""
