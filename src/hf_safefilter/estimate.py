"""What scoring a dataset will take, before weights are loaded or downloaded.

Tokens come from a sample of the rows. Time and memory come from a trial on this machine (`probe.py`): the model's first blocks
with random weights, at two depths, fit the real anchors and score real rows; both grow by the same amount with each block, so
that a line through two depths tells the whole model's.
"""

from __future__ import annotations

import logging
import shutil
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import psutil
import torch

from .chat import ChatEncoder
from .display import facts_html
from .engine.loading import DTYPES, SPREAD, context_length_of, default_device, load_config, load_tokenizer
from .errors import EvaluationError, InputError, first_line
from .scorer import ATTRIBUTION, SafetyRiskScorer
from .tables import Table

if TYPE_CHECKING:
    from datasets import Dataset

    from .engine.identity import Source
    from .engine.loading import ModelSpec

logger = logging.getLogger(__name__)

SAMPLE = 1000
# Depths to try, deepest first: the deeper, the nearer; shallower ones are for models of which so many blocks do not fit.
_DEPTHS = ((4, 12), (2, 6), (1, 3), (1, 2))
_SHORT = "; THIS IS NOT ENOUGH"


@dataclass(frozen=True)
class Estimate:
    """What scoring will take; seconds and bytes. What could not be told is `None`, and `remarks` say why.

    Attributes:
        rows, sampled: in the dataset, and read for this.
        unscorable: the share of the sampled rows that cannot be scored; `reasons` by how many.
        tokens, response_tokens: of all rows, after truncation; `tokens_interval` is the sample's 95%.
        parameters, layers: of the model.
        weights: bytes of the weights in the dtype they run in; `download` of the files that are not in the cache yet.
        fit_seconds, score_seconds: without loading the model.
        memory: the host's peak; `device_memory` the GPU's.
        disk: the scored rows at most, once in the cache of `datasets` and once in the output.
        measured: how it was measured.
    """

    rows: int
    sampled: int
    unscorable: float
    reasons: dict[str, int]
    tokens: int
    tokens_interval: tuple[int, int]
    response_tokens: int
    model: str
    dtype: str
    device: str
    threads: int
    parameters: int
    layers: int
    weights: int
    download: int | None
    fit_seconds: float | None
    score_seconds: float | None
    memory: int | None
    device_memory: int | None
    disk: int
    measured: str | None
    remarks: tuple[str, ...]

    def as_dict(self) -> dict[str, Any]:
        """As plain data."""
        return asdict(self)

    def facts(self) -> dict[str, str]:
        """In words, with what is free on this machine beside it."""
        low, high = self.tokens_interval
        read = "all read" if self.sampled == self.rows else f"{self.sampled:,} read"
        facts: dict[str, str] = {"rows": f"{self.rows:,} ({read}; {self.unscorable:.1%} of these cannot be scored)"}
        if self.reasons:
            facts["no score"] = "; ".join(f"{count:,}: {reason}" for reason, count in list(self.reasons.items())[:3])
        width = f"{low:,} to {high:,}, of which in responses" if low != high else "in responses"
        facts["tokens"] = f"{self.tokens:,} ({width} {self.response_tokens:,})"
        facts["model"] = f"{self.parameters:,} parameters in {self.layers} blocks, {_bytes(self.weights)} in {self.dtype}"
        facts["download"] = "not known" if self.download is None else _bytes(self.download)
        if self.fit_seconds is not None and self.score_seconds is not None:
            threads = f" with {self.threads} thread{'s' * (self.threads > 1)}" if self.device == "cpu" else ""
            parts = f"anchors {_duration(self.fit_seconds)}, rows {_duration(self.score_seconds)}"
            facts["time"] = f"{_duration(self.fit_seconds + self.score_seconds)}: {parts}, on {self.device}{threads}"
        if self.device_memory is not None:
            facts["GPU memory"] = f"{_bytes(self.device_memory)} at the peak"
        if self.memory is not None:
            free = psutil.virtual_memory().available
            facts["memory"] = f"{_bytes(self.memory)} at the peak ({_bytes(free)} free{_SHORT * (free < self.memory)})"
        free = shutil.disk_usage(Path()).free
        short = _SHORT * (free < self.disk + (self.download or 0))
        facts["disk"] = f"{_bytes(self.disk)} at most, output and cache together ({_bytes(free)} free here{short})"
        facts |= {"measured": f"{self.measured}; loading the model comes on top"} if self.measured else {}
        facts |= {"remarks": "; ".join(self.remarks)} if self.remarks else {}
        return facts

    def __str__(self) -> str:
        return "\n".join(f"{name:10}  {text}" for name, text in self.facts().items())

    def _repr_html_(self) -> str:
        return facts_html("Estimate", self.facts())


def estimate_scoring(
    ds: Dataset,
    scorer: SafetyRiskScorer,
    *,
    rows: int | None = None,
    sample: int = SAMPLE,
    trial: bool = True,
    say: Callable[[str], None] = logger.info,
) -> Estimate:
    """What `ds.map(scorer, batched=True)` will take on this machine.

    Args:
        ds: the dataset, or a part of it that stands for the whole.
        scorer: of a model named by Hub id, folder or file. Its weights are not read.
        rows: how many rows the whole has; by default those of `ds`.
        sample: rows to read, spread evenly.
        trial: time and memory are measured; without, they are `None`.
        say: told what is done next.

    Raises:
        InputError: no rows, none of the sampled that can be scored, or a model that was given loaded.
    """
    if not len(ds):
        raise InputError("there are no rows to estimate for")
    spec = scorer.spec
    if "loaded" in (spec.model.kind, spec.tokenizer.kind):
        raise InputError("an estimate needs the model and the tokenizer by name (Hub id, folder or file), not loaded")
    total = len(ds) if rows is None else rows
    config = load_config(spec)
    encoder = ChatEncoder(load_tokenizer(spec), min(scorer.max_length, context_length_of(config)), scorer.target)
    picked = np.unique(np.linspace(0, len(ds) - 1, min(sample, len(ds))).round().astype(int))
    say(f"reading {len(picked)} rows")
    part = ds.select(picked)
    table = Table({name: part[name][:] for name in part.column_names}, scorer.columns)
    examples, status = scorer.encode(table, encoder)
    lengths = np.array([0 if e is None else len(e.input_ids) for e in examples])
    targets = sum(0 if e is None else len(e.target_positions) for e in examples)
    scorable = np.flatnonzero(lengths)
    if not len(scorable):
        raise InputError(f"none of {len(picked)} sampled rows could be scored; the first: {status[0]}")
    mean = lengths.mean()
    # The sample is drawn from `total` rows: a whole dataset that was read has no sampling error.
    unread = max(0.0, 1 - len(picked) / total)
    spread = 1.96 * lengths.std() * (unread / len(picked)) ** 0.5
    parameters, layers = _size(config)
    width = DTYPES[spec.dtype].itemsize
    remarks: list[str] = []
    found: dict[str, Any] = dict.fromkeys(("fit_seconds", "score_seconds", "memory", "device_memory", "measured"))
    # Layers that are spread over GPUs run one after the other: no faster than on one.
    device = default_device() if scorer.device in (None, SPREAD) else scorer.device
    if trial:
        order = scorable[np.argsort(lengths[scorable], kind="stable")]
        timed = [table.rows[i] for i in order], lengths[order]
        try:
            found = _trial(scorer, device, config, *timed, parameters=parameters, layers=layers, tokens=mean * total, say=say)
        except EvaluationError as error:
            remarks.append(f"time and memory are not known: {error}")
    return Estimate(
        rows=total, sampled=len(picked), unscorable=1 - len(scorable) / len(picked),
        reasons=dict(Counter(why for e, why in zip(examples, status, strict=True) if e is None).most_common()),
        tokens=round(mean * total), tokens_interval=(round((mean - spread) * total), round((mean + spread) * total)),
        response_tokens=round(targets / len(picked) * total), model=spec.model.name, dtype=spec.dtype, device=device,
        threads=torch.get_num_threads(), parameters=parameters, layers=layers, weights=parameters * width,
        download=_download(spec, remarks), disk=round(2 * total * _row_bytes(part, scorer, mean)),
        remarks=tuple(remarks), **found,
    )  # fmt: skip


def _size(config: Any) -> tuple[int, int]:
    """The model's parameters and blocks; it is made without memory."""
    from transformers import AutoModelForCausalLM

    try:
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config)
    except (ValueError, KeyError, TypeError, ImportError) as error:
        raise InputError(f"no causal language model: {first_line(error)}") from None
    return sum(p.numel() for p in model.parameters()), config.get_text_config().num_hidden_layers


def _trial(
    scorer: SafetyRiskScorer, device: str, config: Any, rows: Sequence[Any], lengths: np.ndarray, *, parameters: int,
    layers: int, tokens: float, say: Callable[[str], None],
) -> dict[str, Any]:  # fmt: skip
    """Seconds and peak memory of the whole model, from trials at two depths."""
    from .probe import COUNTS, measure, shallow

    width = DTYPES[scorer.spec.dtype].itemsize
    free = _free(device)
    for low, high in _DEPTHS:
        depths = (layers,) if layers <= high else (low, high)
        # Anchor directions are fitted dense, in float32: three sides, and as much again while they are made.
        need = _size(shallow(config, depths[-1]))[0] * (width + (16 if scorer.needs.gradient else 0))
        if need < 0.7 * free:
            break
    else:
        raise EvaluationError(f"a trial needs about {need / 2**30:.1f} GiB, and {free / 2**30:.1f} are free")
    # Rows spread evenly over the lengths, each set's mean near the sample's.
    counts = [c for c in COUNTS if c <= len(rows)] or [len(rows)]
    chosen = {c: np.linspace(0, len(rows) - 1, 2 * c + 1)[1::2].round().astype(int) for c in counts}
    results = []
    for depth in depths:
        say(f"timing {depth} of {layers} blocks with random weights")
        some = {c: [rows[i] for i in places] for c, places in chosen.items()}
        results.append(measure(scorer, device, depth, some))
        timed = results[-1]["timed"]
        chosen = {timed: chosen[timed]}  # the same rows at both depths
    whole = lambda of: _line(depths, [of(r) for r in results], layers)  # noqa: E731
    weights = parameters * width
    empty = results[0]["empty"]
    # What loading holds at once: a GGUF file is dequantized in float32.
    loading = empty + (max(weights, 4 * parameters) if scorer.spec.gguf_file else weights)
    on_host = 0 if device.startswith("cuda") else weights
    peaks = [empty + on_host + whole(lambda r: r[phase] - r["model"]) for phase in ("fit", "score")]  # noqa: B023
    on_device = [whole(lambda r: r[f"device_{phase}"]) for phase in ("fit", "score")] if not on_host else []  # noqa: B023
    fit = 0.0 if scorer.reference is not None else whole(lambda r: r["fit_seconds"])
    at = f"{' and '.join(map(str, depths))} of {layers} blocks" if len(depths) > 1 else f"all {layers} blocks"
    return {
        "fit_seconds": fit,
        "score_seconds": whole(lambda r: r["score_seconds"]) * tokens / int(lengths[chosen[timed]].sum()),
        "memory": round(max(loading, *peaks)) if results[0]["fit"] else None,
        "device_memory": round(max(on_device)) if on_device else None,
        "measured": f"{timed} rows on {at}, with random weights",
    }


def _line(depths: Sequence[int], values: Sequence[float], layers: int) -> float:
    """The value at `layers` on the line through values at two depths; never under the deepest's."""
    if len(depths) == 1:
        return values[0]
    slope = (values[1] - values[0]) / (depths[1] - depths[0])
    return values[1] + max(0.0, slope) * (layers - depths[1])


def _free(device: str) -> int:
    """Bytes of memory that are free on the device."""
    if device.startswith("cuda"):
        try:
            return torch.cuda.mem_get_info(device)[0]
        except (RuntimeError, AssertionError, ValueError) as error:
            raise EvaluationError(f"the device {device} cannot be used: {first_line(error)}") from None
    return psutil.virtual_memory().available


def _row_bytes(part: Dataset, scorer: SafetyRiskScorer, tokens: float) -> float:
    """Bytes of one scored row in Arrow, uncompressed."""
    given = part.with_format("arrow")[:].nbytes / len(part)
    columns = 4 * len(scorer.result_columns) + 32  # and the texts of risk_status and gradient_parameters
    # Attribution holds for each token its text (its bytes and an offset) and a float32.
    terms = 13 * tokens if ATTRIBUTION in scorer.result_columns else 0
    return given + columns + terms


def _download(spec: ModelSpec, remarks: list[str]) -> int | None:
    """Bytes of the files that loading would fetch from the Hub now."""
    total = 0
    for source in (spec.model, spec.adapter):
        if source is None or source.kind != "hub":
            continue
        try:
            total += _missing(source, spec.gguf_file if source is spec.model else None)
        except Exception as error:  # offline, no permission, ...: the rest of the estimate stands
            remarks.append(f"the size of {source.name} on the Hub is not known: {first_line(error)}")
            return None
    return total


def _missing(source: Source, file: str | None) -> int:
    from huggingface_hub import HfApi, try_to_load_from_cache

    found = HfApi().model_info(source.name, revision=source.fingerprint, files_metadata=True)
    names = [s for s in found.siblings or [] if (s.rfilename == file if file else s.rfilename.endswith(".safetensors"))]
    cached = lambda name: isinstance(try_to_load_from_cache(source.name, name, revision=source.fingerprint), str)  # noqa: E731
    sizes = [s.size for s in names if not cached(s.rfilename)]
    if None in sizes:
        raise InputError("it tells no sizes")
    return sum(size or 0 for size in sizes)


def _bytes(count: int) -> str:
    for unit, scale in (("GiB", 2**30), ("MiB", 2**20), ("KiB", 2**10)):
        if count >= scale:
            return f"{count / scale:.1f} {unit}"
    return f"{count} bytes"


def _duration(seconds: float) -> str:
    if seconds < 120:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"
