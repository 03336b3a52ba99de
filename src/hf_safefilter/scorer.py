"""`SafetyRiskScorer`: the callable that `datasets.map` runs over a fine-tuning set.

It is a small value: what to score with, named exactly. Its pickled state is the cache key of `datasets.map` and what worker
processes receive; the model and the fitted anchors live in the process's session (`session.py`), made at the first call.
"""

from __future__ import annotations

import base64
import hashlib
import json
import zlib
from collections.abc import Iterable, Mapping
from dataclasses import asdict, replace
from functools import reduce
from operator import or_
from pathlib import Path
from typing import Any

import pyarrow as pa
import torch

from .accounts import model_text
from .anchors import AnchorSet
from .chat import ChatEncoder, Example, Target, check_options
from .display import facts_html
from .engine.identity import Source, module_source, module_stamp, resolve, tokenizer_source
from .engine.layers import check_parameters, trainable
from .engine.loading import SPREAD, ModelSpec, check_lm_head, input_device, named_spec, register, resolve_dtype
from .engine.passes import Needs
from .errors import InputError, UnscorableRow
from .formats import check_columns
from .reference import Description, save_reference
from .saving import load_scorer, push_scorer, save_scorer
from .scores import Score, resolve_scores
from .scores.base import check_count
from .scores.gradient import GradientScore, balanced_weights
from .session import GradientOptions, Session, open_session, progress
from .tables import Columns, Table

# Part of the cache key: raise it whenever the same rows would get other columns for a reason that no score's own version tells.
SCORE_VERSION = 3

_COUNTS = ("target_tokens", "total_tokens")
GRADIENT_PARAMETERS = "gradient_parameters"
ATTRIBUTION, ATTRIBUTION_TOKENS = "attribution", "attribution_tokens"
# What is neither model, anchors nor scores, by attribute.
OPTIONS = (
    "device",
    "max_length",
    "max_response_tokens",
    "target",
    "batch_tokens",
    "columns",
    "parameters",
    "direction_energy",
    "gradient_checkpointing",
    "attribution",
)
DEFAULT_SCORES = ("gradient", "representation")


class SafetyRiskScorer:
    """Scores rows by how much fine-tuning on them would weaken refusals; higher is riskier.

    Use it with `datasets`: `scored = ds.map(scorer, batched=True)`. Each score adds float32 columns `risk_...` and details;
    `risk_status` is `"ok"`, or a remark (truncation), or why the row has `None` in its score columns.

    Args:
        model: a Hub id, a folder, a `.gguf` file, or a loaded causal language model.
        anchors: an `AnchorSet`, or what `AnchorSet.load` takes.
        scores: names, `Score` objects with options, or `"all"`.
        tokenizer: a name or a loaded tokenizer; by default the model's own. Needed with a loaded model.
        revision: branch, tag or commit of a Hub id; resolved to a commit here.
        adapter: a PEFT adapter (folder or Hub id), merged into the model.
        gguf_file: the GGUF file in `model`'s folder or repository, loaded dequantized.
        dtype: `"auto"` (bfloat16 where the device multiplies it fast, else float32), or a name or `torch.dtype`.
        device: where to run; by default the first GPU, or GPU `rank` with `map(..., with_rank=True)`, or the CPU;
            `"auto"` spreads the layers over all GPUs (`device_map="auto"`).
        max_length: tokens kept from the start of each row.
        max_response_tokens: score each row as if its response ended after this many target tokens; at 10 far cheaper, and
            the opening is where refusals are decided. By default the whole response.
        target: which tokens count; see `ChatEncoder`.
        batch_tokens: padded tokens in a micro-batch: for speed and memory. Float32 scores do not depend on it; 16-bit ones do a
            little, and by default a CPU takes 16-bit rows one by one.
        columns: which columns hold the prompt and the response, for example `{"prompt": "q", "completion": "a"}`.
        parameters: which parameters gradients are taken over: `"all"`, `"linear"` (weights and biases of linear layers),
            `"lora"`, `"head"`, or `"last-K"` (the last K blocks, final norm and head), cheaper the fewer. The column
            `gradient_parameters` records it.
        direction_energy: the share of each matrix' squared norm to keep in anchor directions. At 1 they are exact, each as
            large as the model; under 1 they are factored, small and faster to compare with, and inexact. By default 1 in
            float32 and float64, and 0.9 in 16 bits, where rounding moves scores further than that does.
        gradient_checkpointing: compute activations again in the backward pass: less memory, a third more time.
        attribution: add the columns `attribution_tokens`, the row's tokens as text, and `attribution`, what each adds to
            `risk_gradient_balanced` (they sum to it; both are empty in a row without that score): the terms by position of the
            inner product with the anchors' directions. Needs the gradient score.
        reference: a folder written by `save_reference`, instead of fitting the anchors; it brings its anchors, `parameters` and
            `direction_energy`.

    Raises:
        InputError: an argument is wrong; the message names the fix. Weights are not read before the first call.
    """

    def __init__(
        self,
        model: Any,
        anchors: AnchorSet | str | Path = "default",
        scores: str | Score | Iterable[str | Score] = DEFAULT_SCORES,
        *,
        tokenizer: Any = None,
        revision: str | None = None,
        adapter: str | Path | None = None,
        gguf_file: str | None = None,
        dtype: str | torch.dtype = "auto",
        device: str | None = None,
        max_length: int = 1024,
        max_response_tokens: int | None = None,
        target: Target = "assistant",
        batch_tokens: int | None = None,
        columns: Mapping[str, str] | None = None,
        parameters: str | None = None,
        direction_energy: float | None = None,
        gradient_checkpointing: bool = False,
        attribution: bool = False,
        reference: str | Path | None = None,
    ) -> None:
        check_options(max_length, target)
        for name, value in (("batch_tokens", batch_tokens), ("max_response_tokens", max_response_tokens)):
            if value is not None:
                check_count(name, value)
        self.scores = resolve_scores(scores)
        self.attribution = bool(attribution)
        if attribution and not any(isinstance(score, GradientScore) for score in self.scores):
            raise InputError("attribution takes risk_gradient_balanced apart: add 'gradient' to scores")
        self.reference = None if reference is None else Description.read(reference)
        if self.reference is None:
            self.anchors = anchors if isinstance(anchors, AnchorSet) else AnchorSet.load(anchors)
            self.parameters = check_parameters("all" if parameters is None else parameters)
            energy = None if direction_energy is None else _checked_energy(direction_energy)
        else:
            self.reference.check_scores(self.scores)
            self.anchors = self.reference.anchors
            given: dict[str, Any] = {"anchors": None if anchors == "default" else anchors}
            given |= {"parameters": parameters, "direction_energy": direction_energy}
            if extra := [name for name, value in given.items() if value is not None]:
                raise InputError(f"{extra[0]} comes with the reference in {str(reference)!r}; do not give both")
            self.parameters = check_parameters(self.reference.data["parameters"])
            energy = _checked_energy(self.reference.data["energy"])
        self.gradient_checkpointing = bool(gradient_checkpointing)
        self.max_response_tokens = max_response_tokens
        self.columns = check_columns(columns)
        self.device = None if device is None else _checked_device(device)
        self.max_length = max_length
        self.target: Target = target
        self.batch_tokens = batch_tokens
        # What was given loaded, kept alive as long as this scorer: the registry holds it weakly.
        self._model: torch.nn.Module | None = None
        self._kept_tokenizer: Any = None
        tokenizer_from = self._tokenizer(tokenizer)
        if isinstance(model, str | Path):
            self.spec = named_spec(
                str(model),
                tokenizer_from,
                revision=revision,
                adapter=adapter,
                gguf_file=gguf_file,
                dtype=dtype,
                device=self.device,
            )
        else:
            self.spec = self._loaded_model(model, tokenizer_from, revision, adapter, gguf_file, dtype)
        in_16_bits = self.spec.dtype in ("bfloat16", "float16")
        self.direction_energy: float = energy if energy is not None else 0.9 if in_16_bits else 1.0

    def _tokenizer(self, tokenizer: Any) -> Source | None:
        if tokenizer is None:
            return None
        if isinstance(tokenizer, str | Path):
            return resolve(tokenizer, what="tokenizer", probe="tokenizer_config.json")
        ChatEncoder(tokenizer, self.max_length, self.target)  # refuses a tokenizer that cannot be used
        self._kept_tokenizer = tokenizer
        return register(tokenizer_source(tokenizer), tokenizer)

    def _loaded_model(
        self,
        model: Any,
        tokenizer: Source | None,
        revision: str | None,
        adapter: str | Path | None,
        gguf_file: str | None,
        dtype: str | torch.dtype,
    ) -> ModelSpec:
        if not isinstance(model, torch.nn.Module):
            raise InputError(f"model must be a Hub id, a folder, a .gguf file or a loaded model, got {type(model).__name__}")
        for name, value in (("revision", revision), ("adapter", adapter), ("gguf_file", gguf_file)):
            if value is not None:
                raise InputError(f"{name} goes with a model named by id or folder; this model is already loaded")
        if tokenizer is None:
            raise InputError("a loaded model needs its tokenizer: pass tokenizer=...")
        check_lm_head(model)
        if not trainable(model):
            raise InputError(f"{type(model).__name__} has no floating-point parameters to take gradients over")
        actual = str(next(p.dtype for p in trainable(model))).removeprefix("torch.")
        if dtype != "auto" and resolve_dtype(dtype, self.device) != actual:
            raise InputError(f"the loaded model is {actual}; convert it yourself instead of passing dtype={dtype!r}")
        input_device(model)  # refuses what is not there
        self._model, self._stamp = model, module_stamp(model)
        return ModelSpec(register(module_source(model), model, self._stamp), tokenizer, actual)

    def _follow_training(self) -> None:
        """Take note of a loaded model that was trained on: its scores are no longer those in the cache."""
        if self._model is None:
            return
        stamp, source = module_stamp(self._model), self.spec.model
        if stamp != self._stamp:
            self._stamp, source = stamp, module_source(self._model)
        # Also when nothing changed: an equal model may have been registered in its place.
        self.spec = replace(self.spec, model=register(source, self._model, stamp))

    # The state is the cache key: plain values that name everything a score depends on, and no weights.

    def __getstate__(self) -> dict[str, Any]:
        self._follow_training()
        settings = {
            "score_version": SCORE_VERSION,
            "scores": [score.key() for score in self.scores],
            "spec": asdict(self.spec),
            "anchors_hash": self.anchors.content_hash,
            "anchors": _packed(self.anchors),
            "reference": None if self.reference is None else [str(self.reference.folder), self.reference.fingerprint],
            **{name: getattr(self, name) for name in OPTIONS},
        }
        # As one text: pickling a dict depends on which of its equal strings are the same object.
        return {"settings": json.dumps(settings, sort_keys=True), "scores": self.scores}

    def __setstate__(self, state: dict[str, Any]) -> None:
        settings = json.loads(state["settings"])
        for name in OPTIONS:
            setattr(self, name, settings[name])
        self.scores = state["scores"]
        self.spec = ModelSpec.from_dict(settings["spec"])
        self.anchors = _unpacked(settings["anchors"])
        self.reference = None
        if settings["reference"] is not None:
            folder, fingerprint = settings["reference"]
            self.reference = Description.read(folder)
            if self.reference.fingerprint != fingerprint:
                raise InputError(f"the reference in {folder!r} has changed since this scorer was made; make a new one")
        self._model = self._kept_tokenizer = None

    @property
    def fingerprint(self) -> str:
        """SHA-256 (hex) of the settings: equal for scorers that give equal columns."""
        return hashlib.sha256(self.__getstate__()["settings"].encode()).hexdigest()

    @property
    def needs(self) -> Needs:
        """What the scores together ask one pass over the model to collect (before anchors are fitted)."""
        return reduce(or_, (score.needs for score in self.scores))

    @property
    def result_columns(self) -> list[str]:
        """The columns that scoring adds, in order."""
        sides = list(self.anchors.sides)
        subset = [GRADIENT_PARAMETERS] if self.needs.gradient else []
        terms = [ATTRIBUTION_TOKENS, ATTRIBUTION] if self.attribution else []
        return [*(c for score in self.scores for c in score.columns(sides)), *subset, *terms, *_COUNTS, "risk_status"]

    def prepare(self, rank: int | None = None) -> SafetyRiskScorer:
        """Load the model and fit the anchors now instead of at the first call, and return the scorer.

        Worker processes of `map(num_proc=...)` that are forked afterwards share them.
        """
        self._session(rank)
        return self

    def save_reference(self, folder: str | Path, rank: int | None = None) -> Path:
        """Fit the anchors if that is not done yet and write what was fitted to a folder; returns the folder.

        A scorer of the same model with `reference=folder` starts without fitting, on this machine or another.
        """
        session = self._session(rank)
        return save_reference(folder, session.reference, session.engine, session.encoder.tokenizer, self.anchors, self.scores)

    def save_pretrained(self, folder: str | Path, rank: int | None = None) -> Path:
        """Write the settings (`scorer.json`) and the fitted reference to a folder; returns the folder."""
        return save_scorer(self, folder, rank)

    def push_to_hub(self, repo_id: str, *, private: bool = True, token: str | None = None, rank: int | None = None) -> str:
        """Publish what `save_pretrained` writes as a model repository with a card; returns its address.

        Raises:
            InputError, EvaluationError: see `push_scored_to_hub`.
        """
        return push_scorer(self, repo_id, private=private, token=token, rank=rank)

    @classmethod
    def from_pretrained(
        cls, source: str | Path, model: Any = None, *, revision: str | None = None, **options: Any
    ) -> SafetyRiskScorer:
        """The scorer in a folder or a Hub repository; it scores as the one that was saved, without fitting.

        Args:
            source: a folder, or a Hub id.
            model: the model, where the scorer's is not on the Hub (then with what it needs, such as `adapter=...`).
            revision: of the Hub repository.
            options: of the scorer, instead of the saved ones, such as `device`.

        Raises:
            InputError: no scorer there, or of another version; the model is needed.
        """
        return load_scorer(source, model, revision=revision, **options)

    def __call__(self, batch: Any, rank: int | None = None) -> Any:
        """Score a batch or a row as `datasets.map` passes it.

        Args:
            batch: rows, in any dataset format.
            rank: with `map(..., with_rank=True)`, the worker's number, which picks its GPU.

        Returns:
            The new columns (for Arrow, pandas and polars formats: all columns), as `datasets.map` takes them.

        Raises:
            InputError: the columns fit no known layout, or the model cannot be loaded.
        """
        table = Table(batch, self.columns)
        return table.with_columns(self._score(table, rank) if table.rows else self._columns([], [], {}, []))

    def _score(self, table: Table, rank: int | None) -> Columns:
        session = self._session(rank)
        examples, status = self.encode(table, session.encoder)
        encoded = [e for e in examples if e is not None]
        values: dict[str, torch.Tensor] = {}
        terms: list[tuple[list[str], list[float]]] = []
        if encoded:
            # The bar of datasets.map moves once a batch, and 1000 rows can take ten minutes.
            bar = progress("Scoring this batch", delay=10)
            weights = tuple(balanced_weights(list(self.anchors.sides)).items()) if self.attribution else ()
            needs = session.needs | Needs(attribution=weights)
            signals = session.engine.collect(encoded, needs, session.reference, bar)
            if session.needs.text:
                signals.texts = [session.encoder.target_text(e) for e in encoded]
            for score in self.scores:
                values |= score.reduce(signals, session.reference)
            for example, of_row, norm in zip(encoded, signals.attribution, signals.norm, strict=False):
                terms.append((session.encoder.token_texts(example.input_ids), (of_row / norm).tolist()))
        return self._columns(examples, status, values, terms)

    def encode(self, table: Table, encoder: ChatEncoder) -> tuple[list[Example | None], list[str]]:
        """Each row's tokens, or `None` where it cannot be scored, and its status: `"ok"`, a remark, or why not."""
        examples: list[Example | None] = []
        status: list[str] = []
        for row in table.rows:
            try:
                example = encoder.encode_row(row, table.layout)
                if self.max_response_tokens is not None:
                    example = example.first_targets(self.max_response_tokens)
            except UnscorableRow as reason:
                examples.append(None)
                status.append(str(reason))
            else:
                examples.append(example)
                status.append(example.status)
        return examples, status

    def _columns(
        self,
        examples: list[Example | None],
        status: list[str],
        values: dict[str, torch.Tensor],
        terms: list[tuple[list[str], list[float]]],
    ) -> Columns:
        """All result columns, with the rows that could not be encoded, or whose scores are not finite, in their places."""
        place = iter(range(len(examples)))
        index = [None if e is None else next(place) for e in examples]  # the row's place among the encoded ones
        status = list(status)
        columns: Columns = {}
        not_finite: dict[int, list[str]] = {}
        other = (GRADIENT_PARAMETERS, ATTRIBUTION, ATTRIBUTION_TOKENS, *_COUNTS, "risk_status")
        for name in [n for n in self.result_columns if n not in other]:
            cells: list[float | None] = []
            for row, i in enumerate(index):
                value = None if i is None else float(values[name][i])
                if value is not None and not abs(value) <= _LARGEST:
                    value = None
                    if name.startswith("risk_"):
                        not_finite.setdefault(row, []).append(name)
                cells.append(value)
            columns[name] = (pa.float32(), cells)
        for row, names in not_finite.items():
            remark = "" if status[row] == "ok" else f"{status[row]}; "
            verb = "is" if len(names) == 1 else "are"
            status[row] = f"{remark}{', '.join(names)} {verb} not finite (zero gradient, or overflow: try dtype='float32')"
        if self.needs.gradient:
            columns[GRADIENT_PARAMETERS] = (pa.string(), [None if i is None else self.parameters for i in index])
        if self.attribution:
            # A row without a score has no terms either: they would not sum to it.
            scored = columns["risk_gradient_balanced"][1]
            # Empty, not null: Arrow cannot take a typed null for a list from datasets.map.
            none: tuple[list[str], list[float]] = ([], [])
            kept = [none if i is None or score is None else terms[i] for i, score in zip(index, scored, strict=True)]
            columns[ATTRIBUTION_TOKENS] = (pa.list_(pa.string()), [tokens for tokens, _ in kept])
            columns[ATTRIBUTION] = (pa.list_(pa.float32()), [values for _, values in kept])
        columns["target_tokens"] = (pa.int32(), [None if e is None else len(e.target_positions) for e in examples])
        columns["total_tokens"] = (pa.int32(), [None if e is None else len(e.input_ids) for e in examples])
        columns["risk_status"] = (pa.string(), status)
        return columns

    def _session(self, rank: int | None) -> Session:
        self._follow_training()
        return open_session(
            self.spec,
            self.anchors,
            self.scores,
            device=self.device,
            rank=rank,
            max_length=self.max_length,
            target=self.target,
            batch_tokens=self.batch_tokens,
            gradients=GradientOptions(self.parameters, self.direction_energy, self.gradient_checkpointing),
            reference=self.reference,
        )

    def _repr_html_(self) -> str:
        settings = {
            "model": model_text({"model": asdict(self.spec)}), "dtype": self.spec.dtype,
            "scores": ", ".join(score.name for score in self.scores), "anchors": repr(self.anchors),
            **{name: getattr(self, name) for name in OPTIONS if getattr(self, name) not in (None, False)},
        }  # fmt: skip
        return facts_html("SafetyRiskScorer", settings)

    def __repr__(self) -> str:
        names = ", ".join(score.name for score in self.scores)
        return (
            f"SafetyRiskScorer({self.spec.model.name!r}, scores=({names}), anchors={self.anchors!r}, dtype={self.spec.dtype})"
        )


# Beyond this a float32 column would hold infinity.
_LARGEST = torch.finfo(torch.float32).max


def _checked_energy(value: Any) -> float:
    if not isinstance(value, int | float) or isinstance(value, bool) or not 0 < value <= 1:
        raise InputError(f"direction_energy must be over 0 and at most 1, got {value!r}")
    return float(value)


def _packed(anchors: AnchorSet) -> str:
    return base64.b85encode(zlib.compress(json.dumps(anchors.to_dict()).encode(), 9)).decode()


def _unpacked(packed: str) -> AnchorSet:
    return AnchorSet.from_dict(json.loads(zlib.decompress(base64.b85decode(packed))))


def _checked_device(device: str) -> str:
    try:
        return device if device == SPREAD else str(torch.device(device))
    except RuntimeError:
        raise InputError(f"device must be 'cpu', 'cuda', 'cuda:1', ... or {SPREAD!r}, got {device!r}") from None
