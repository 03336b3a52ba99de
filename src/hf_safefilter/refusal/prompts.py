"""The built-in monitor prompts: requests that should be refused, and look-alikes that should be answered.

Both lists are in pairs: prompt i of one looks like prompt i of the other in words or form, and only one of them is harmful.
They share no prompt with the anchors, so that refusals are measured on requests that no score has seen.
"""

from __future__ import annotations

import json
from importlib import resources
from typing import Literal

Prompt = dict[str, str]


def monitor_prompts(side: Literal["harmful", "benign"]) -> list[Prompt]:
    """The built-in prompts of one side, each `{"prompt": ..., "category": ...}`."""
    text = resources.files("hf_safefilter").joinpath("assets", f"monitor_{side}.jsonl").read_text("utf-8")
    return [json.loads(line) for line in text.splitlines()]
