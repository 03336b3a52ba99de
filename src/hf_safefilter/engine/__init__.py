"""The engine: one forward and at most one backward over a micro-batch collect all signals that the scores asked for."""
