"""Refusals: the prompts they are measured on."""
