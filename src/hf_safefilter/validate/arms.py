"""Which rows each arm of a study trains on.

    top, bottom             the k riskiest and least risky rows; top:COLUMN, bottom:COLUMN by another score
    random                  k rows of all
    random_length_matched   k rows outside the top, each about as long as one of the top (target tokens)
    random_list_only        k list-format rows outside the top
    bins                    five quantile bins by risk, bin_1 the riskiest fifth; k rows of each; bins:COLUMN
    subsets:M               M random sets of k rows, subset_000 on, for a linear datamodelling test
    all                     every row
    filtered:F              all but the riskiest share F
    random_filtered:F       all but a random share F

Rows drawn at random depend on the seed; top, bottom, all and filtered do not.
"""

from __future__ import annotations

import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from ..errors import InputError

DEFAULT_ARMS = ("top", "bottom", "random", "random_length_matched", "random_list_only")
BINS = 5


@dataclass(frozen=True)
class Pool:
    """What arms draw from: `rows` [pool] are indices into the dataset; the rest is by position in `rows`.

    Attributes:
        risks: risk [pool] by score column, higher is riskier; the first is what `top` alone means.
        lengths: target tokens [pool].
        lists: whether a row is in list format [pool].
    """

    rows: np.ndarray
    risks: Mapping[str, np.ndarray]
    lengths: np.ndarray
    lists: np.ndarray

    def __len__(self) -> int:
        return len(self.rows)

    def risk(self, column: str | None) -> np.ndarray:
        """Risk [pool] by a column, or by the first."""
        name = column or next(iter(self.risks))
        if name not in self.risks:
            raise InputError(f"no score column {name!r}; it has {', '.join(self.risks)}")
        return self.risks[name]


def expand(names: Sequence[str]) -> list[str]:
    """Arm names one by one, `bins` and `subsets:M` spelled out.

    Raises:
        InputError: an unknown name, one given twice, a share out of range, or none.
    """
    found: list[str] = []
    for name in names:
        kind, _, option = name.partition(":")
        suffix = f":{option}" if option else ""
        if kind == "bins":
            found += [f"bin_{i + 1}{suffix}" for i in range(BINS)]
        elif kind == "subsets":
            if not option.isdecimal() or int(option) < 1:
                raise InputError(f"{name!r}: say how many, such as subsets:40")
            found += [f"subset_{i:03d}" for i in range(int(option))]
        else:
            _check(name)
            found.append(name)
    if not found:
        raise InputError("no arms")
    if repeated := sorted({n for n in found if found.count(n) > 1}):
        raise InputError(f"the arm {repeated[0]!r} is given twice")
    return found


def draw(name: str, pool: Pool, k: int, seed: int) -> list[int]:
    """The dataset rows of one arm, riskiest first where the arm is by risk, sorted where all are meant.

    Args:
        name: one of `expand`'s.
        pool: what to draw from.
        k: rows of an arm that is not a share of the whole.
        seed: of rows drawn at random.

    Raises:
        InputError: too few rows for this arm, or arms that would overlap.
    """
    kind, _, option = name.partition(":")
    # One stream for each arm and seed: adding an arm must not change what the others draw.
    rng = np.random.default_rng([seed, zlib.crc32(name.encode())])
    if kind == "all":
        return sorted(pool.rows.tolist())
    if kind in ("filtered", "random_filtered"):
        order = _riskiest_first(pool.risk(None)) if kind == "filtered" else rng.permutation(len(pool))
        removed = round(float(option) * len(pool))
        return sorted(pool.rows[order[removed:]].tolist())
    _need(name, k, len(pool))
    if kind == "random" or kind.startswith("subset_"):
        return pool.rows[rng.choice(len(pool), k, replace=False)].tolist()
    if kind.startswith("bin_"):
        order = np.array_split(_riskiest_first(pool.risk(option)), BINS)[int(kind[4:]) - 1]
        _need(name, k, len(order))
        return pool.rows[rng.choice(order, k, replace=False)].tolist()
    order = _riskiest_first(pool.risk(option if kind in ("top", "bottom") else None))
    if 2 * k > len(pool):
        raise InputError(f"k={k} of {len(pool)} rows: top, bottom and their controls would overlap; use a k of at most "
                         f"{len(pool) // 2}")  # fmt: skip
    if kind == "top":
        return pool.rows[order[:k]].tolist()
    if kind == "bottom":
        return pool.rows[order[::-1][:k]].tolist()
    top, rest = order[:k], order[k:]
    if kind == "random_list_only":
        rest = rest[pool.lists[rest]]
        _need(f"{name}: list-format rows outside the top", k, len(rest))
        return pool.rows[rng.choice(rest, k, replace=False)].tolist()
    return pool.rows[_matched(pool.lengths, top, rest, rng)].tolist()


def _matched(lengths: np.ndarray, top: np.ndarray, rest: np.ndarray, rng: np.random.Generator) -> list[int]:
    """For each row of `top` one of `rest` not yet taken, drawn among the five nearest in log length."""
    free = rest[np.argsort(lengths[rest], kind="stable")].tolist()
    chosen = []
    for row in rng.permutation(top):
        gaps = np.abs(np.log1p(lengths[free]) - np.log1p(lengths[row]))
        near = np.lexsort((rng.random(len(free)), gaps))[:5]
        chosen.append(free.pop(int(rng.choice(near))))
    return chosen


def _riskiest_first(risk: np.ndarray) -> np.ndarray:
    return np.argsort(-risk, kind="stable")


def _need(name: str, k: int, there: int) -> None:
    if k > there:
        raise InputError(f"the arm {name} needs {k} rows and there are {there}; use a smaller k, or leave it out")


def _check(name: str) -> None:
    kind, _, option = name.partition(":")
    if kind in ("filtered", "random_filtered"):
        try:
            share = float(option)
        except ValueError:
            share = -1.0
        if not 0 < share < 1:
            raise InputError(f"{name!r}: say what share is removed, such as {kind}:0.1")
    elif kind not in ("top", "bottom", "random", "random_length_matched", "random_list_only", "all") or (
        option and kind not in ("top", "bottom")
    ):
        raise InputError(
            f"unknown arm {name!r}; arms are top, bottom, top:COLUMN, bottom:COLUMN, random, random_length_matched, "
            "random_list_only, bins, bins:COLUMN, subsets:M, all, filtered:SHARE, random_filtered:SHARE"
        )
