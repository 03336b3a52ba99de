"""What risky rows look like against the rest: format, mathematics, length, opening words, kind."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from .scores.baselines import is_list, is_math

_NUMBERED = re.compile(r"^\s*\d{1,3}[.)]\s+\S", re.MULTILINE)


def describe(text: str) -> dict[str, Any]:
    """A response's format: `list` (at least two item lines), `numbered` among those, `math`, `lines`, `words`, `opening`."""
    listed = is_list(text)
    return {
        "list": listed,
        "numbered": listed and len(_NUMBERED.findall(text)) >= 2,
        "math": is_math(text),
        "lines": len(text.strip().splitlines()),
        "words": len(text.split()),
        "opening": opening(text),
    }


def opening(text: str) -> str:
    """The first word, lower-cased, or what the response opens with if that is no word: `1.`, `-`, a symbol."""
    first = text.split(maxsplit=1)[:1]
    word = first[0].lower() if first else ""
    return word.strip("\"'*_(,:;!") or word


def patterns(
    texts: Sequence[str], groups: Mapping[str, Sequence[int]], kinds: Sequence[Any] | None = None
) -> list[dict[str, Any]]:
    """One line a group: shares and medians.

    Args:
        texts: each row's response.
        groups: rows by the group's name, such as `top` and `random`.
        kinds: each row's kind or source, where the data say one.

    Returns:
        For each group `rows`; the shares `list`, `numbered`, `math`, `one_line`, `up_to_3_words`, `opens_with_item`; the median
        `words`; the most common `openings` with their shares; and the shares of `kinds`.
    """
    described = [describe(text) for text in texts]
    table = []
    for name, rows in groups.items():
        found = [described[i] for i in rows]
        share = lambda flags: float(np.mean(list(flags))) if found else float("nan")  # noqa: B023, E731
        common = Counter(d["opening"] for d in found).most_common(5)
        table.append(
            {
                "group": name,
                "rows": len(found),
                "list": share(d["list"] for d in found),
                "numbered": share(d["numbered"] for d in found),
                "math": share(d["math"] for d in found),
                "one_line": share(d["lines"] <= 1 for d in found),
                "up_to_3_words": share(d["words"] <= 3 for d in found),
                "opens_with_item": share(bool(re.match(r"[-*•]|\d+[.)]", d["opening"])) for d in found),
                "words": float(np.median([d["words"] for d in found])) if found else float("nan"),
                "openings": {word: count / len(found) for word, count in common},
                "kinds": {} if kinds is None else _shares(kinds[i] for i in rows),
            }
        )
    return table


def _shares(values: Any) -> dict[str, float]:
    counted = Counter(str(v) for v in values)
    total = sum(counted.values())
    return {name: count / total for name, count in sorted(counted.items(), key=lambda item: (-item[1], item[0]))}
