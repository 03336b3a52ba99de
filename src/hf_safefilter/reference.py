"""The fitted anchor reference as an artifact: what rows are compared with, saved so that it need not be fitted again.

A folder with `reference.safetensors` (tensors) and `reference.json` (what they are and what they were fitted on). It fits one
model only: its weights and tokenizer are named by their content, however they were loaded, and another model is refused.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from .anchors import AnchorSet
from .engine.directions import Directions
from .engine.identity import tokenizer_source, weights_fingerprint
from .engine.passes import Engine, Reference
from .errors import InputError, first_line
from .files import replacing, write_atomically
from .scores import Score

TENSORS = "reference.safetensors"
DESCRIPTION = "reference.json"
_FORMAT = "hf_safefilter.reference/1"
_KEYS = ("model", "tokenizer", "anchors", "scores", "parameters", "energy", "direction_energy", "tensors_sha256")


@dataclass(frozen=True)
class Description:
    """`reference.json`: what a saved reference was fitted on and with, as plain data, and where it is.

    `model` and `tokenizer` are fingerprints of their content; `scores` are `Score.key()`s; `direction_energy` is the share of
    each direction's squared norm that was kept, where `energy` was asked for.
    """

    folder: Path
    data: dict[str, Any]

    @property
    def anchors(self) -> AnchorSet:
        """The anchors that it was fitted on."""
        return AnchorSet.from_dict(self.data["anchors"], source=str(self.folder / DESCRIPTION))

    @property
    def fingerprint(self) -> str:
        """SHA-256 (hex) of all of it."""
        return hashlib.sha256(json.dumps(self.data, sort_keys=True).encode()).hexdigest()

    @classmethod
    def read(cls, folder: str | Path) -> Description:
        """Read a folder's description.

        Raises:
            InputError: the folder holds no fitted reference, or one of another format.
        """
        path = Path(folder) / DESCRIPTION
        try:
            data = json.loads(path.read_text("utf-8"))
        except OSError:
            raise InputError(f"no fitted reference in {str(folder)!r}: it has no {DESCRIPTION}") from None
        except ValueError as error:
            raise InputError(f"{path} is not valid JSON: {error}") from None
        if not isinstance(data, dict) or data.get("format") != _FORMAT:
            found = data.get("format") if isinstance(data, dict) else None
            raise InputError(f"{path} has the format {found!r}; this version reads {_FORMAT!r}")
        if missing := [key for key in _KEYS if key not in data]:
            raise InputError(f"{path} is damaged: it lacks {missing[0]!r}")
        return cls(Path(folder).resolve(), data)

    def check_scores(self, scores: Iterable[Score]) -> None:
        """Raise `InputError` for a score that the reference was not fitted for, or with other options."""
        fitted = {key["name"]: key for key in self.data["scores"]}
        for score in scores:
            if score.name not in fitted:
                raise InputError(
                    f"the reference in {str(self.folder)!r} was not fitted for the score {score.name!r}; it has "
                    f"{', '.join(sorted(fitted))}"
                )
            if json.loads(json.dumps(score.key())) != fitted[score.name]:
                raise InputError(
                    f"the reference in {str(self.folder)!r} was fitted with other options of {score.name!r}: "
                    f"{fitted[score.name]}"
                )

    def load(self, engine: Engine, tokenizer: Any) -> Reference:
        """The reference, on the engine's device.

        Raises:
            InputError: it was fitted on another model, tokenizer or parameter subset, or its tensors are damaged.
        """
        here = {"model": weights_fingerprint(engine.model), "tokenizer": tokenizer_source(tokenizer).fingerprint}
        for what, found in here.items():
            if found != self.data[what]:
                raise InputError(
                    f"the reference in {str(self.folder)!r} was fitted on another {what} ({self.data[what][:12]}, this one is "
                    f"{found[:12]}); fit one for this {what}: hf-safefilter fit"
                )
        path = self.folder / TENSORS
        try:
            digest = _digest(path)
            tensors = load_file(path)
        except (OSError, SafetensorError) as error:
            raise InputError(f"cannot read {path}: {first_line(error)}") from None
        if digest != self.data["tensors_sha256"]:
            raise InputError(f"{path} is not the file that {DESCRIPTION} describes; fit the reference again")
        fitted: dict[str, dict[str, torch.Tensor]] = {key["name"]: {} for key in self.data["scores"]}
        parts = {}
        for key, tensor in tensors.items():
            group, _, rest = key.partition("/")
            if group == "directions":
                parts[rest] = tensor
            else:
                score, _, name = rest.partition("/")
                fitted[score][name] = tensor
        energy: dict[str, float] = self.data["direction_energy"]
        directions = Directions.from_tensors(list(energy), parts, energy).beside(engine.units) if energy else None
        return Reference(fitted, directions)


def save_reference(
    folder: str | Path, reference: Reference, engine: Engine, tokenizer: Any, anchors: AnchorSet, scores: Sequence[Score]
) -> Path:
    """Write a fitted reference to a folder, made where missing; returns the folder.

    Tensors go first and the description last, each in one step: a folder with a description is complete.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {f"fitted/{s}/{name}": t for s, of_score in reference.fitted.items() for name, t in of_score.items()}
    if reference.directions is not None:
        tensors |= {f"directions/{name}": t for name, t in reference.directions.tensors().items()}
    with replacing(folder / TENSORS) as partial:
        save_file({name: t.detach().cpu().contiguous() for name, t in tensors.items()}, partial)
    data = {
        "format": _FORMAT,
        "model": weights_fingerprint(engine.model),
        "tokenizer": tokenizer_source(tokenizer).fingerprint,
        "anchors": anchors.to_dict(),
        "scores": [score.key() for score in scores],
        "parameters": engine.parameters,
        "energy": engine.energy,
        "direction_energy": {} if reference.directions is None else reference.directions.energy,
        "tensors_sha256": _digest(folder / TENSORS),
    }
    write_atomically(folder / DESCRIPTION, (json.dumps(data, indent=1, ensure_ascii=False) + "\n").encode())
    return folder


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
