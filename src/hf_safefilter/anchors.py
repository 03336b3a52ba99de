"""Anchors: demonstrations of complying with harmful requests, and of refusing them, that rows are compared with.

An anchor is a request and an opening line. Openings carry no usable content: what matters to the scores is the step from a
harmful request to an affirmative answer, and the built-in set must be safe to ship.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .errors import InputError, first_line
from .files import write_atomically

if TYPE_CHECKING:
    from datasets import Dataset

Demonstration = dict[str, str]

FILE_NAME = "anchors.json"
_FORMAT = "hf_safefilter.anchors/1"
_KEYS = {"prompt", "completion", "category"}


class AnchorSet:
    """Harmful demonstrations and one or more sets of safe ones (He et al. 2024, section 4: bi-directional anchors).

    Args:
        harmful: demonstrations of complying, each `{"prompt": request, "completion": affirmative opening}` and perhaps
            `"category"`.
        safe: sets of demonstrations of refusing, each a list of the same form. The requests should be the harmful ones, so that
            the two sides differ in the answer only.
        name: what to call the set in logs and cards.

    Raises:
        InputError: an empty side, or a demonstration without a prompt or completion text; the message names which.
    """

    def __init__(
        self,
        harmful: Sequence[Mapping[str, str]],
        safe: Sequence[Sequence[Mapping[str, str]]],
        name: str | None = None,
    ) -> None:
        if isinstance(safe, Sequence) and safe and isinstance(safe[0], Mapping):
            raise InputError("safe must be a list of sets, each a list of demonstrations; wrap your one set: safe=[[...]]")
        if not isinstance(safe, Sequence) or isinstance(safe, str) or not safe:
            raise InputError("the anchor set has no safe side: give at least one set of refusals, safe=[[...]]")
        self.harmful = _checked(harmful, "harmful")
        self.safe = [_checked(side, f"safe[{i}]") for i, side in enumerate(safe)]
        self.name = name

    @property
    def sides(self) -> dict[str, list[Demonstration]]:
        """The sides by name: `harmful`, `safe_1`, `safe_2`, ...; the columns of the scores are named after them."""
        return {"harmful": self.harmful, **{f"safe_{i}": side for i, side in enumerate(self.safe, start=1)}}

    @property
    def categories(self) -> list[str]:
        """Categories of the harmful side, sorted; empty where it names none."""
        return sorted({d["category"] for d in self.harmful if "category" in d})

    @property
    def content_hash(self) -> str:
        """SHA-256 (hex) of what the scores depend on: prompts and completions, in order; not names or categories."""
        sides = [[[d["prompt"], d["completion"]] for d in side] for side in self.sides.values()]
        return hashlib.sha256(json.dumps(sides).encode()).hexdigest()

    def subset(self, categories: Iterable[str]) -> AnchorSet:
        """The set with only the demonstrations of these categories, on every side.

        Raises:
            InputError: a category that the harmful side does not have, or a side that would be left empty.
        """
        wanted = [categories] if isinstance(categories, str) else list(categories)
        if unknown := sorted(set(wanted) - set(self.categories)):
            raise InputError(f"no category {unknown[0]!r} among the anchors; there are {', '.join(self.categories) or 'none'}")
        keep = lambda side: [d for d in side if d.get("category") in wanted]  # noqa: E731
        name = f"{self.name or 'anchors'}[{','.join(wanted)}]"
        return AnchorSet(keep(self.harmful), [keep(side) for side in self.safe], name)

    def to_dict(self) -> dict[str, Any]:
        """The set as plain data, as it is written to `anchors.json`."""
        return {"format": _FORMAT, "name": self.name, "harmful": self.harmful, "safe": self.safe}

    @classmethod
    def from_dict(cls, data: Any, source: str = "the anchor data") -> AnchorSet:
        """The inverse of `to_dict`; `source` names the data in errors.

        Raises:
            InputError: data of another shape.
        """
        if not isinstance(data, Mapping) or "harmful" not in data or "safe" not in data:
            raise InputError(f"{source} is not an anchor set: it needs the keys 'harmful' and 'safe'")
        if data.get("format", _FORMAT) != _FORMAT:
            raise InputError(f"{source} has the format {data['format']!r}; this version reads {_FORMAT!r}")
        return cls(data["harmful"], data["safe"], data.get("name"))

    @classmethod
    def load(cls, source: str | Path = "default", *, revision: str | None = None) -> AnchorSet:
        """Load the built-in set (`"default"`), a file or folder written by `save`, or a Hub dataset repository.

        Args:
            source: `"default"`, a path, or a Hub id such as `"org/anchors"` of a dataset repository with `anchors.json`.
            revision: branch, tag or commit of a Hub repository.

        Raises:
            InputError: nothing there, or not an anchor set.
        """
        if source == "default":
            asset = resources.files(__package__).joinpath("assets", FILE_NAME)
            return cls.from_dict(json.loads(asset.read_text("utf-8")))
        path = Path(source)
        if path.is_dir():
            path = path / FILE_NAME
        if not path.is_file():
            path = _download(str(source), revision)
        try:
            data = json.loads(path.read_text("utf-8"))
        except ValueError as error:
            raise InputError(f"{path} is not valid JSON: {error}") from None
        return cls.from_dict(data, source=str(path))

    def save(self, path: str | Path) -> Path:
        """Write the set to a `.json` file, or as `anchors.json` into a folder; returns the file's path."""
        path = Path(path)
        if path.suffix != ".json":
            path = path / FILE_NAME
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(path, (json.dumps(self.to_dict(), indent=1, ensure_ascii=False) + "\n").encode())
        return path

    def push_to_hub(self, repo_id: str, *, private: bool = True, token: str | None = None) -> str:
        """Publish the set as a dataset repository with a card, which `load` reads; returns its address.

        Raises:
            InputError, EvaluationError: see `push_scored_to_hub`.
        """
        from .cards import card
        from .hub import push_files

        values = {
            "harmful": len(self.harmful),
            "safe": len(self.safe),
            "name": self.name or "",
            "content_hash": self.content_hash[:12],
        }
        data = (json.dumps(self.to_dict(), indent=1, ensure_ascii=False) + "\n").encode("utf-8", "backslashreplace")

        def make_card(repo_id: str, old: str | None) -> str:
            return card("anchors_card.md.jinja", values | {"repo_id": repo_id}, repo_id, {}, old)

        return push_files({FILE_NAME: data}, make_card, repo_id, "dataset", private=private, token=token)

    @classmethod
    def from_dataset(
        cls,
        dataset: Dataset,
        *,
        prompt: str = "prompt",
        harmful: str = "harmful",
        safe: str | Sequence[str] = "safe",
        category: str | None = None,
        name: str | None = None,
    ) -> AnchorSet:
        """Build a set from a dataset with one request a row: a column with its affirmative answer and columns with refusals.

        Args:
            dataset: the rows.
            prompt, harmful: columns with the request and with the affirmative answer.
            safe: the column with the refusal, or several columns, one for each safe set.
            category: the column with the category, if there is one.
            name: what to call the set.

        Raises:
            InputError: a column that is not there, or a row without text in one of them.
        """
        safe = [safe] if isinstance(safe, str) else list(safe)
        for column in [prompt, harmful, *safe, *([category] if category else [])]:
            if column not in dataset.column_names:
                raise InputError(f"the dataset has no column {column!r}; it has {', '.join(dataset.column_names)}")
        rows = list(dataset.with_format(None))
        side = lambda column: [  # noqa: E731
            {"prompt": r[prompt], "completion": r[column], **({"category": r[category]} if category else {})} for r in rows
        ]
        return cls(side(harmful), [side(column) for column in safe], name)

    def __repr__(self) -> str:
        sizes = " + ".join(str(len(side)) for side in self.safe)
        return f"AnchorSet({self.name or 'unnamed'}: {len(self.harmful)} harmful, {sizes} safe, {self.content_hash[:12]})"

    def __eq__(self, other: object) -> bool:
        return isinstance(other, AnchorSet) and self.to_dict() == other.to_dict()

    __hash__ = None  # type: ignore[assignment]  # mutable lists inside; use content_hash


def _checked(side: Any, name: str) -> list[Demonstration]:
    if not isinstance(side, Sequence) or isinstance(side, str) or not side:
        raise InputError(f"the anchor side {name} is empty: it needs at least one demonstration")
    for i, demonstration in enumerate(side):
        where = f"{name}[{i}]"
        if not isinstance(demonstration, Mapping):
            raise InputError(f"{where} must be a dict with 'prompt' and 'completion', got {type(demonstration).__name__}")
        for key in ("prompt", "completion"):
            text = demonstration.get(key)
            if not isinstance(text, str) or not text.strip():
                raise InputError(f"{where} has no {key}: it must be a text that is not empty")
        if unknown := sorted(set(demonstration) - _KEYS):
            raise InputError(f"{where} has the unknown key {unknown[0]!r}; the keys are {', '.join(sorted(_KEYS))}")
    return [dict(d) for d in side]


def _download(repo_id: str, revision: str | None) -> Path:
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        return Path(hf_hub_download(repo_id, FILE_NAME, repo_type="dataset", revision=revision))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError) as error:
        raise InputError(
            f"no anchor set at {repo_id!r}: not 'default', not a file or folder, and not a Hub dataset repository "
            f"with {FILE_NAME} ({first_line(error)})"
        ) from None
