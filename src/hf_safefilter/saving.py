"""A scorer as an artifact: its settings and its fitted reference in a folder or on the Hub, to score elsewhere in the same way.

`scorer.json` names the model by its commit (Hub) or by its content alone (folders, loaded models); `reference.safetensors` and
`reference.json` are what `save_reference` writes. Nothing is pickled.
"""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .accounts import model_text, without_folders
from .errors import InputError, first_line
from .files import write_atomically
from .reference import DESCRIPTION, TENSORS

if TYPE_CHECKING:
    from .scorer import SafetyRiskScorer

SCORER_FILE = "scorer.json"
_FORMAT = "hf_safefilter.scorer/1"
# Options that belong to the machine, or come with the reference.
_LEFT_OUT = ("device", "parameters", "direction_energy")


def save_scorer(scorer: SafetyRiskScorer, folder: str | Path, rank: int | None = None) -> Path:
    """Write a scorer and its fitted reference to a folder; returns it. The settings go last: with them it is complete."""
    folder = scorer.save_reference(folder, rank)
    write_atomically(folder / SCORER_FILE, (json.dumps(described(scorer), indent=1, ensure_ascii=False) + "\n").encode())
    return folder


def described(scorer: SafetyRiskScorer) -> dict[str, Any]:
    """The settings as plain data, without paths of this machine."""
    from dataclasses import asdict

    from .scorer import OPTIONS

    return {
        "format": _FORMAT,
        "model": without_folders(asdict(scorer.spec)),
        "scores": [score.key() for score in scorer.scores],
        "options": {name: getattr(scorer, name) for name in OPTIONS if name not in _LEFT_OUT},
    }


def load_scorer(source: str | Path, model: Any = None, *, revision: str | None = None, **options: Any) -> SafetyRiskScorer:
    """A scorer from a folder or a Hub repository; see `SafetyRiskScorer.from_pretrained`."""
    from .scorer import OPTIONS, SafetyRiskScorer
    from .scores.registry import score_of

    folder = _fetched(source, revision)
    path = folder / SCORER_FILE
    try:
        data = json.loads(path.read_text("utf-8"))
    except (OSError, ValueError) as error:
        raise InputError(f"no scorer in {str(source)!r}: {first_line(error)}") from None
    if not isinstance(data, dict) or data.get("format") != _FORMAT:
        found = data.get("format") if isinstance(data, dict) else None
        raise InputError(f"{path} has the format {found!r}; this version reads {_FORMAT!r}")
    try:
        scores = [score_of(key) for key in data["scores"]]
        given: dict[str, Any] = {name: value for name, value in data["options"].items() if name in OPTIONS}
        if model is None:
            model, named = _named_model(data["model"], source)
            given |= named
    except InputError as error:
        raise InputError(f"{path}: {error}") from None
    except (KeyError, TypeError, AttributeError) as error:
        raise InputError(f"{path} is damaged: {type(error).__name__} {error}") from None
    return SafetyRiskScorer(model, scores=scores, reference=folder, **(given | options))


def _named_model(spec: dict[str, Any], source: str | Path) -> tuple[str, dict[str, Any]]:
    """The name of a model on the Hub, and the options that say which of its commits and files."""
    if spec["model"]["kind"] != "hub":
        raise InputError(f"the scorer in {str(source)!r} was made with a model that is not on the Hub: pass model=...")
    named = {"revision": spec["model"]["fingerprint"], "gguf_file": spec["gguf_file"], "dtype": spec["dtype"]}
    if spec["tokenizer"] != spec["model"]:
        named["tokenizer"] = spec["tokenizer"]["name"]
    if spec["adapter"]:
        named["adapter"] = spec["adapter"]["name"]
    return spec["model"]["name"], named


def push_scorer(
    scorer: SafetyRiskScorer, repo_id: str, *, private: bool = True, token: str | None = None, rank: int | None = None
) -> str:
    """Publish a scorer as a model repository; see `SafetyRiskScorer.push_to_hub`."""
    from .cards import card
    from .hub import check_repo_id, push_files

    check_repo_id(repo_id)  # fitting takes long
    data = described(scorer)
    values = {
        "model": model_text({"model": data["model"]}), "scores": ", ".join(score.name for score in scorer.scores),
        "anchors": scorer.anchors.name or "", "anchors_hash": scorer.anchors.content_hash[:12],
        "on_hub": data["model"]["model"]["kind"] == "hub",
    }  # fmt: skip
    with tempfile.TemporaryDirectory() as temporary:
        folder = save_scorer(scorer, temporary, rank)
        files: dict[str, str | bytes] = {name: str(folder / name) for name in (TENSORS, DESCRIPTION, SCORER_FILE)}

        def make_card(repo_id: str, old: str | None) -> str:
            metadata = {"library_name": "hf_safefilter"}
            return card("scorer_card.md.jinja", values | {"repo_id": repo_id}, repo_id, metadata, old)

        return push_files(files, make_card, repo_id, "model", private=private, token=token)


def _fetched(source: str | Path, revision: str | None) -> Path:
    """The folder, or a snapshot of the repository's three files."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    if Path(source).is_dir():
        return Path(source)
    try:
        return Path(snapshot_download(str(source), revision=revision, allow_patterns=[TENSORS, DESCRIPTION, SCORER_FILE]))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        raise InputError(f"no scorer at {str(source)!r}: not a folder, and not on the Hub ({first_line(error)})") from None
