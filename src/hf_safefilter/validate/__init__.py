"""Does a score predict harm on this model? Fine-tune on the rows that it chooses, and on controls, and measure."""

from .arms import DEFAULT_ARMS
from .attack import Outcome, Subject
from .recipe import TEMPLATES, AttackRecipe, Evaluation
from .study import Plan, groups, plan, run, write_tables
from .summary import summarize

__all__ = [
    "DEFAULT_ARMS", "TEMPLATES", "AttackRecipe", "Evaluation", "Outcome", "Plan", "Subject", "groups", "plan", "run",
    "summarize", "write_tables",
]  # fmt: skip
