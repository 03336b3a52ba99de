"""The plan of a sharded run: what all of its workers must agree on, and what tells one run's files from another's."""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .errors import InputError, first_line
from .files import write_atomically
from .saving import described

if TYPE_CHECKING:
    from .scorer import SafetyRiskScorer

PLAN_FILE = "plan.json"
_FORMAT = "hf_safefilter.shards/1"


@dataclass(frozen=True)
class Plan:
    """What a folder's shards are of.

    `rows` is `None` for a stream, `data` a fingerprint of the rows' content, `on_hub` whether `name` is a dataset there,
    `scorer` all that a score depends on.
    """

    rows: int | None
    num_shards: int
    piece_rows: int
    data: str
    name: str
    on_hub: bool
    scorer: dict[str, Any]

    def __post_init__(self) -> None:
        for what in ("num_shards", "piece_rows"):
            if (value := getattr(self, what)) < 1:
                raise InputError(f"{what} must be at least 1, got {value}")

    def range(self, shard: int) -> tuple[int, int]:
        """The shard's rows, from the first to before the last."""
        assert self.rows is not None, "a stream has no shards"
        return shard * self.rows // self.num_shards, (shard + 1) * self.rows // self.num_shards

    def pieces(self, shard: int) -> list[tuple[int, int]]:
        """The shard's pieces."""
        start, stop = self.range(shard)
        return [(at, min(at + self.piece_rows, stop)) for at in range(start, stop, self.piece_rows)]

    def save(self, folder: Path) -> None:
        """Write it, in one step."""
        content = {"format": _FORMAT, **asdict(self), "fingerprint": self.fingerprint}
        write_atomically(folder / PLAN_FILE, (json.dumps(content, indent=1, ensure_ascii=False) + "\n").encode())

    @property
    def fingerprint(self) -> str:
        """SHA-256 (hex): equal for plans whose shards have the same content."""
        return hashlib.sha256(json.dumps(asdict(self) | {"name": ""}, sort_keys=True).encode()).hexdigest()


def read_plan(folder: str | Path) -> Plan:
    """A folder's plan.

    Raises:
        InputError: none there, damaged, or of another version.
    """
    path = Path(folder) / PLAN_FILE
    try:
        data = json.loads(path.read_text("utf-8"))
        if data.pop("format") != _FORMAT:
            raise InputError(f"{path} is of another version of hf_safefilter")
        fingerprint = data.pop("fingerprint")
        plan = Plan(**data)
    except FileNotFoundError:
        raise InputError(f"no shards in {str(folder)!r}: it has no {PLAN_FILE}") from None
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        if isinstance(error, InputError):
            raise
        raise InputError(f"{path} is damaged ({first_line(error)})") from None
    if plan.fingerprint != fingerprint:
        raise InputError(f"{path} was changed by hand: its fingerprint does not fit")
    return plan


def identity(scorer: SafetyRiskScorer) -> dict[str, Any]:
    """All that scores depend on, without names and paths of this machine."""
    from . import __version__
    from .scorer import SCORE_VERSION

    settings = described(scorer)
    settings.pop("format")
    settings["options"] |= {"parameters": scorer.parameters, "direction_energy": scorer.direction_energy}
    return settings | {
        "anchors": {"name": scorer.anchors.name, "sha256": scorer.anchors.content_hash},
        "reference": None if scorer.reference is None else scorer.reference.fingerprint,
        "score_version": SCORE_VERSION, "version": __version__,
    }  # fmt: skip


def agree(there: Plan, ours: Plan, folder: Path) -> None:
    """Raise `InputError` that names what differs between a folder's plan and this run."""
    for name, what in (("data", "other rows, or rows that have changed"), ("rows", "another number of rows"),
                       ("num_shards", "another number of shards"), ("piece_rows", "another --piece-rows")):  # fmt: skip
        if getattr(there, name) != getattr(ours, name):
            found = "" if name == "data" else f" ({getattr(there, name)}, not {getattr(ours, name)})"
            raise InputError(f"{str(folder)!r} holds shards of {what}{found}: use another folder")
    if there.fingerprint != ours.fingerprint:
        differ = sorted(k for k in {*there.scorer, *ours.scorer} if there.scorer.get(k) != ours.scorer.get(k))
        raise InputError(
            f"{str(folder)!r} holds shards scored with another scorer (other {', '.join(differ)}): use another folder"
        )
