"""Layouts and rows."""

from __future__ import annotations

import numpy as np
import pytest

from hf_safefilter.errors import InputError, UnscorableRow
from hf_safefilter.formats import check_columns, find_layout, to_conversation

USER = {"role": "user", "content": "Q"}
ASSISTANT = {"role": "assistant", "content": "A"}


def read(row, columns=None):
    return to_conversation(row, find_layout(row, check_columns(columns)))


@pytest.mark.parametrize(
    ("row", "prompt_messages"),
    [
        ({"messages": [USER, ASSISTANT]}, None),
        ({"messages": {"role": ["user", "assistant"], "content": ["Q", "A"]}}, None),
        ({"messages": np.array([USER, ASSISTANT], dtype=object)}, None),
        ({"conversations": [{"from": "human", "value": "Q"}, {"from": "gpt", "value": "A"}]}, None),
        ({"conversations": [USER, ASSISTANT]}, None),
        ({"prompt": "Q", "completion": "A"}, 1),
        ({"prompt": [USER], "completion": [ASSISTANT]}, 1),
        ({"prompt": [USER], "completion": "A"}, 1),
        ({"instruction": "Q", "output": "A"}, 1),
        ({"instruction": "Q", "input": "", "output": "A", "text": "all of it"}, 1),
        ({"instruction": "Q", "context": None, "response": "A", "category": "qa"}, 1),
        ({"question": "Q", "answer": "A"}, 1),
        ({"messages": [{**USER, "content": [{"type": "text", "text": "Q"}]}, ASSISTANT]}, None),
    ],
)
def test_layouts(row, prompt_messages):
    conversation = read(row)
    assert conversation.messages == (USER, ASSISTANT)
    assert conversation.prompt_messages == prompt_messages


def test_inputs_and_contexts_follow_the_instruction():
    assert read({"instruction": "Q", "input": "I", "output": "A"}).messages[0]["content"] == "Q\n\nI"
    assert read({"instruction": "Q", "context": "C", "response": "A"}).messages[0]["content"] == "Q\n\nC"


def test_text():
    assert read({"text": "T"}).text == "T"


def test_system_column():
    system = {"role": "system", "content": "S"}
    assert read({"instruction": "Q", "output": "A", "system": "S"}).messages == (system, USER, ASSISTANT)
    assert read({"instruction": "Q", "output": "A", "system": "S"}).prompt_messages == 2
    assert read({"instruction": "Q", "output": "A", "system": None}).messages == (USER, ASSISTANT)
    # A conversation's own system message goes before the column.
    own = {"conversations": [{"from": "system", "value": "own"}, {"from": "human", "value": "Q"}], "system": "S"}
    assert [m["content"] for m in read(own).messages] == ["own", "Q"]


def test_columns_are_told():
    row = {"q": "Q", "a": "A", "messages": None}
    assert read(row, {"prompt": "q", "completion": "a"}).messages == (USER, ASSISTANT)
    assert read({"chat": [USER, ASSISTANT]}, {"messages": "chat"}).messages == (USER, ASSISTANT)
    assert read({"body": "T"}, {"text": "body"}).text == "T"


def test_tools_as_list_or_json():
    row = {"messages": [USER, ASSISTANT], "tools": '[{"name": "t"}]'}
    assert read(row).tools == [{"name": "t"}]
    assert read({**row, "tools": [{"name": "t"}]}).tools == [{"name": "t"}]
    assert read({**row, "tools": None}).tools is None
    with pytest.raises(UnscorableRow, match="tools is not valid JSON"):
        read({**row, "tools": "{"})
    with pytest.raises(UnscorableRow, match="tools is dict, not a list"):
        read({**row, "tools": "{}"})


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ({"prompt": None, "completion": "A"}, "prompt is null"),
        ({"instruction": None, "input": "x", "output": "A"}, "instruction is null"),
        ({"prompt": "Q", "completion": None}, "completion is null"),
        ({"prompt": "Q", "completion": float("nan")}, "completion is null"),
        ({"prompt": "Q", "completion": 7}, "completion is int, not text"),
        ({"prompt": "Q", "completion": b"A"}, "completion is bytes, not text"),
        ({"prompt": "Q", "completion": []}, "completion is empty"),
        ({"prompt": "Q\ud800", "completion": "A"}, "prompt is not valid Unicode: a lone surrogate at character 1"),
        ({"messages": None}, "messages is null"),
        ({"messages": []}, "messages is empty"),
        ({"messages": "text"}, "messages is str, not text or a list of messages"),
        ({"messages": [USER, "A"]}, r"messages\[1\] is str, not a message"),
        ({"messages": [USER, {"content": "A"}]}, r"messages\[1\] has no role"),
        ({"messages": [USER, {"role": "villain", "content": "A"}]}, r"messages\[1\] has the unknown role 'villain'"),
        ({"messages": [USER, {"role": "assistant", "content": None}]}, r"messages\[1\] content is null"),
        ({"messages": [USER, {"role": "assistant"}]}, r"messages\[1\] content is null"),
        ({"messages": [USER, {"role": "assistant", "content": {"a": 1}}]}, r"messages\[1\] content is dict, not text"),
        ({"messages": [USER, {"role": "assistant", "content": [{"type": "image"}]}]}, "part of type 'image'"),
        ({"messages": [USER, {"role": "assistant", "content": [3]}]}, "part of type 'int'"),
        ({"text": None}, "text is null"),
        ({"text": " \n"}, "text is empty"),
    ],
)
def test_bad_rows(row, reason):
    with pytest.raises(UnscorableRow, match=reason):
        read(row)


def test_unknown_columns():
    with pytest.raises(InputError, match=r"cannot tell prompt from response among the columns 'a', 'b'; pass columns="):
        find_layout(["b", "a"])
    with pytest.raises(InputError, match=r"columns\['completion'\] is 'y', but the dataset has no such column; it has 'x'"):
        find_layout(["x"], {"prompt": "x", "completion": "y"})


@pytest.mark.parametrize(
    ("columns", "reason"),
    [
        ("prompt", "must be a dict"),
        ({"question": "q"}, "unknown part 'question'"),
        ({"prompt": "q", "completion": 3}, r"columns\['completion'\] must be a column name"),
        ({"prompt": "q"}, "must name 'messages', or 'text', or both"),
    ],
)
def test_bad_columns_argument(columns, reason):
    with pytest.raises(InputError, match=reason):
        check_columns(columns)
