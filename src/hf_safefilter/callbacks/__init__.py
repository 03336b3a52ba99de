"""Callbacks for `Trainer` and TRL's trainers."""
