"""The prompts that refusals are measured on: requests that should be refused, and look-alikes that should be answered.

The built-in lists are in pairs: prompt i of one looks like prompt i of the other in words or form, and only one of them is
harmful. They share no prompt with the anchors, so that refusals are measured on requests that no score has seen.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from importlib import resources
from pathlib import Path
from typing import Any, Literal

from ..chat import ChatEncoder
from ..errors import InputError, UnscorableRow
from ..formats import Message

Prompt = dict[str, str]
Side = Literal["harmful", "benign"]


def monitor_prompts(side: Side) -> list[Prompt]:
    """The built-in prompts of one side, each `{"prompt": ..., "category": ...}`."""
    text = resources.files("hf_safefilter").joinpath("assets", f"monitor_{side}.jsonl").read_text("utf-8")
    return [json.loads(line) for line in text.splitlines()]


def load_prompts(prompts: str | Path | Iterable[Any], side: Side) -> list[list[Message]]:
    """Prompts as conversations that wait for an answer.

    Args:
        prompts: `"default"` for the built-in ones, a JSON-lines file, or a list. Each prompt is a text, a list of messages that
            ends with the user's, or a dict with either under `prompt`.
        side: which built-in list `"default"` is, and what errors call the prompts.

    Raises:
        InputError: no prompts, a file that cannot be read, or something that is not a prompt; names its place.
    """
    if isinstance(prompts, str) and prompts == "default":
        rows: list[Any] = list(monitor_prompts(side))
    elif isinstance(prompts, str | Path):
        rows = _read(Path(prompts))
    else:
        rows = list(prompts)
    if not rows:
        raise InputError(f"no {side} prompts: give at least one")
    return [_conversation(row, f"{side} prompt {i}") for i, row in enumerate(rows)]


def prompt_ids(encoder: ChatEncoder, conversation: Sequence[Message], where: str, longest: int) -> list[int]:
    """The tokens [tokens] that the model reads before it answers.

    Args:
        encoder: renders with the model's chat template.
        conversation: messages, the user's last.
        where: names the prompt in errors.
        longest: the most tokens that leave room for an answer.

    Raises:
        InputError: the chat template rejects the prompt, or it is too long.
    """
    try:
        text = encoder.render(conversation, add_generation_prompt=True)
    except UnscorableRow as reason:
        raise InputError(f"{where}: {reason}") from None
    ids: list[int] = encoder.tokenizer(text, add_special_tokens=False)["input_ids"]
    if len(ids) > longest:
        raise InputError(f"{where} has {len(ids)} tokens, and with its answer the model's context has room for {longest}")
    return ids


def _read(path: Path) -> list[Any]:
    try:
        lines = path.read_text("utf-8").splitlines()
        return [json.loads(line) for line in lines if line.strip()]
    except (OSError, ValueError) as error:
        raise InputError(f"cannot read prompts from {str(path)!r} (JSON lines): {error}") from None


def _conversation(row: Any, where: str) -> list[Message]:
    prompt = row.get("prompt") if isinstance(row, dict) else row
    if isinstance(prompt, str) and prompt.strip():
        return [{"role": "user", "content": prompt}]
    if (
        isinstance(prompt, list)
        and prompt
        and all(isinstance(m, dict) and isinstance(m.get("content"), str) and isinstance(m.get("role"), str) for m in prompt)
        and prompt[-1]["role"] == "user"
    ):
        return [dict(m) for m in prompt]
    raise InputError(f"{where} must be a text or messages that end with the user's, got {str(row)[:80]!r}")
