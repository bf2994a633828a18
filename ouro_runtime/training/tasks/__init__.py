"""The task families of `ouro-mini`: seeded problems with a difficulty and a verifier."""

from ouro_runtime.training.tasks.arithmetic import Expressions, Sums
from ouro_runtime.training.tasks.base import Family, Problem, is_held_out
from ouro_runtime.training.tasks.chains import Chains
from ouro_runtime.training.tasks.chat import SYSTEM_PROMPTS, Chat
from ouro_runtime.training.tasks.cups import Cups

FAMILIES: dict[str, Family] = {f.name: f for f in (Sums(), Expressions(), Chains(), Cups())}
"""Families with difficulties; `Chat` stands apart, because it has none."""

__all__ = [
    "FAMILIES",
    "SYSTEM_PROMPTS",
    "Chat",
    "Family",
    "Problem",
    "is_held_out",
]
