"""Row -> conversation: which columns hold the prompt and the response, in each layout that people fine-tune on.

A dataset has one layout, found from its column names or told by `columns`. A row that does not fill its layout (null
response, content that is not text, an unknown role) raises `UnscorableRow`, whose message becomes its `risk_status`.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from .errors import InputError, UnscorableRow

Message = dict[str, Any]

# The parts that `columns={part: column}` can name.
PARTS = ("messages", "prompt", "input", "completion", "system", "text", "tools")

# Name, the columns that must be there, the columns that may be; the first that fits wins. A set with both `messages` and
# `prompt` (no_robots), or both Alpaca columns and `text` (the Hub's alpaca), has its richer form earlier in this table.
LAYOUTS: tuple[tuple[str, dict[str, str], dict[str, str]], ...] = (
    ("messages", {"messages": "messages"}, {"tools": "tools"}),
    ("conversations", {"messages": "conversations"}, {"tools": "tools", "system": "system"}),
    ("prompt-completion", {"prompt": "prompt", "completion": "completion"}, {"tools": "tools"}),
    ("alpaca", {"prompt": "instruction", "completion": "output"}, {"input": "input", "system": "system"}),
    ("dolly", {"prompt": "instruction", "completion": "response"}, {"input": "context"}),
    ("question-answer", {"prompt": "question", "completion": "answer"}, {}),
    ("text", {"text": "text"}, {}),
)

# Speaker names seen in published sets, to the roles that chat templates know.
ROLES = {
    **{role: role for role in ("system", "developer", "user", "assistant", "tool", "function", "ipython")},
    **{"human": "user", "gpt": "assistant", "chatgpt": "assistant", "bing": "assistant", "bard": "assistant"},
    **{"model": "assistant", "bot": "assistant", "observation": "tool", "function_response": "tool"},
}


@dataclass(frozen=True)
class Layout:
    """Which column holds which part; `columns` maps a name of `PARTS` to a column."""

    name: str
    columns: Mapping[str, str]


@dataclass(frozen=True)
class Conversation:
    """One row as chat messages, or as plain text that is trained on whole.

    `prompt_messages` is how many leading messages are the prompt, `None` where the row does not say.
    """

    messages: tuple[Message, ...] = ()
    prompt_messages: int | None = None
    text: str | None = None
    tools: list[Any] | None = None


def check_columns(columns: Mapping[str, str] | None) -> dict[str, str] | None:
    """Check the user's `columns` argument for unknown or missing parts.

    Raises:
        InputError: a part that is not one of `PARTS`, a column name that is not text, or no response among the parts.
    """
    if columns is None:
        return None
    if not isinstance(columns, Mapping):
        raise InputError(f"columns must be a dict such as {{'prompt': ..., 'completion': ...}}, got {columns!r}")
    for part, column in columns.items():
        if part not in PARTS:
            raise InputError(f"columns has the unknown part {part!r}; the parts are {', '.join(PARTS)}")
        if not isinstance(column, str) or not column:
            raise InputError(f"columns[{part!r}] must be a column name, got {column!r}")
    if not ("messages" in columns or "text" in columns or {"prompt", "completion"} <= columns.keys()):
        raise InputError("columns must name 'messages', or 'text', or both 'prompt' and 'completion'")
    return dict(columns)


def find_layout(column_names: Iterable[str], columns: Mapping[str, str] | None = None) -> Layout:
    """Find which columns hold the prompt and the response.

    Raises:
        InputError: `columns` names a column that is not there, or no known layout fits.
    """
    names = set(column_names)
    if columns is not None:
        for part, column in columns.items():
            if column not in names:
                raise InputError(
                    f"columns[{part!r}] is {column!r}, but the dataset has no such column; it has {_listed(names)}"
                )
        return Layout("told", dict(columns))
    for name, required, optional in LAYOUTS:
        if set(required.values()) <= names:
            return Layout(name, {**required, **{p: c for p, c in optional.items() if c in names}})
    raise InputError(
        f"cannot tell prompt from response among the columns {_listed(names)}; "
        "pass columns={'prompt': ..., 'completion': ...} (CLI: --columns prompt=...,completion=...)"
    )


def to_conversation(row: Mapping[str, Any], layout: Layout) -> Conversation:
    """Read one row.

    Raises:
        UnscorableRow: a part is null, empty where it must not be, not text, or a message is malformed.
    """
    part = {name: row[column] for name, column in layout.columns.items()}
    tools = _tools(part.get("tools"))
    if "messages" in part:
        messages = _messages(part["messages"], layout.columns["messages"])
        return Conversation((*_system(part, layout, messages), *messages), tools=tools)
    if "completion" in part:
        prompt, completion = part["prompt"], part["completion"]
        name = layout.columns["prompt"]
        if _is_scalar(prompt):
            prompt, extra = _text(prompt, name), part.get("input")
            if not _is_null(extra) and _text(extra, layout.columns["input"]):
                prompt = f"{prompt}\n\n{extra}"
            prompt = [{"role": "user", "content": prompt}]
        prompt = _messages(prompt, name)
        name = layout.columns["completion"]
        if _is_scalar(completion):
            completion = [{"role": "assistant", "content": _text(completion, name)}]
        completion = _messages(completion, name)
        prompt = (*_system(part, layout, prompt), *prompt)
        return Conversation((*prompt, *completion), prompt_messages=len(prompt), tools=tools)
    text = _text(part["text"], layout.columns["text"])
    if not text.strip():
        raise UnscorableRow(f"{layout.columns['text']} is empty")
    return Conversation(text=text)


def _messages(value: Any, name: str) -> tuple[Message, ...]:
    """Messages in role/content or from/value form, from a list of dicts or (older `datasets`) a dict of lists."""
    if hasattr(value, "tolist"):  # a numpy object array, from a formatted dataset
        value = value.tolist()
    if isinstance(value, Mapping) and value and all(isinstance(v, list) for v in value.values()):
        value = [dict(zip(value, items, strict=True)) for items in zip(*value.values(), strict=True)]
    if _is_null(value):
        raise UnscorableRow(f"{name} is null")
    if not isinstance(value, list | tuple):
        raise UnscorableRow(f"{name} is {type(value).__name__}, not text or a list of messages")
    if not value:
        raise UnscorableRow(f"{name} is empty")
    return tuple(_message(m, f"{name}[{i}]") for i, m in enumerate(value))


def _message(message: Any, name: str) -> Message:
    if not isinstance(message, Mapping):
        raise UnscorableRow(f"{name} is {type(message).__name__}, not a message with role and content")
    # Arrow gives every message the same keys, null where a message had none: drop the nulls.
    message = {k: v for k, v in message.items() if v is not None or k in ("content", "value")}
    role = message.pop("role", None) or message.pop("from", None)
    if role is None:
        raise UnscorableRow(f"{name} has no role")
    if role not in ROLES:
        raise UnscorableRow(f"{name} has the unknown role {str(role)[:40]!r}")
    content = message.pop("content") if "content" in message else message.pop("value", None)
    if isinstance(content, list):
        content = "".join(_text_part(p, name) for p in content)
    if content is None and message.get("tool_calls"):
        return {"role": ROLES[role], "content": None, **message}
    return {**message, "role": ROLES[role], "content": _text(content, f"{name} content")}


def _text_part(part: Any, name: str) -> str:
    if isinstance(part, Mapping) and part.get("type", "text") == "text":
        return _text(part.get("text"), f"{name} content")
    kind = part.get("type") if isinstance(part, Mapping) else type(part).__name__
    raise UnscorableRow(f"{name} content has a part of type {kind!r}; only text can be scored")


def _system(part: Mapping[str, Any], layout: Layout, messages: tuple[Message, ...]) -> tuple[Message, ...]:
    """The system column as a message, where there is one and the messages do not open with their own."""
    value = part.get("system")
    if _is_null(value) or messages[0]["role"] == "system" or not _text(value, layout.columns["system"]):
        return ()
    return ({"role": "system", "content": str(value)},)


def _tools(value: Any) -> list[Any] | None:
    """Tool descriptions as TRL takes them: a list, or its JSON text."""
    if _is_null(value) or value in ("", []):
        return None
    if isinstance(value, str):
        try:
            value = json.loads(value)
        except ValueError as error:
            raise UnscorableRow(f"tools is not valid JSON: {error}") from None
    if not isinstance(value, list):
        raise UnscorableRow(f"tools is {type(value).__name__}, not a list")
    return value


def _is_scalar(value: Any) -> bool:
    return _is_null(value) or not hasattr(value, "__len__") or isinstance(value, str | bytes)


def _text(value: Any, name: str) -> str:
    if _is_null(value):
        raise UnscorableRow(f"{name} is null")
    if not isinstance(value, str):
        raise UnscorableRow(f"{name} is {type(value).__name__}, not text")
    try:
        value.encode("utf-8")
    except UnicodeEncodeError as error:
        raise UnscorableRow(f"{name} is not valid Unicode: a lone surrogate at character {error.start}") from None
    return str(value)


def _is_null(value: Any) -> bool:
    """None, or the NaN that pandas puts in place of a missing text."""
    return value is None or (isinstance(value, float) and value != value)


def _listed(names: set[str]) -> str:
    return ", ".join(repr(n) for n in sorted(names, key=str)) or "(none)"
