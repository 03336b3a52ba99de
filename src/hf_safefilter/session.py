"""What a process holds to score with: loaded models, and anchors encoded and fitted on them.

Sessions are looked up by what they depend on, so that every copy of a scorer in a process, pickled or not, shares one.
"""

from __future__ import annotations

import json
import logging
import os
from collections import OrderedDict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import reduce
from importlib import resources
from operator import or_
from typing import Any

import torch
from datasets.utils import tqdm

from .anchors import AnchorSet, Demonstration
from .chat import ChatEncoder, Example, Target
from .engine.loading import ModelSpec, default_device, load, registered
from .engine.passes import HARMLESS, Engine, Needs, Progress, Reference, Sides
from .errors import InputError, UnscorableRow
from .formats import Conversation
from .reference import Description
from .scores import Score

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Session:
    """A model that is ready to score rows; `needs` is what the scores ask of them."""

    engine: Engine
    encoder: ChatEncoder
    reference: Reference
    needs: Needs


@dataclass(frozen=True)
class GradientOptions:
    """How gradients are taken, and anchor directions kept; see `SafetyRiskScorer`."""

    parameters: str = "all"
    energy: float = 1.0
    checkpointing: bool = False


class _Recent(OrderedDict[Any, Any]):
    """The entries used last: two, so that comparing two models does not load them again and again."""

    def get_or_make(self, key: Any, make: Callable[[], Any]) -> Any:
        if key not in self:
            self[key] = make()
            while len(self) > 2:
                self.popitem(last=False)
        self.move_to_end(key)
        return self[key]


_MODELS = _Recent()
_SESSIONS = _Recent()
_process = {"forked": False}


def open_session(
    spec: ModelSpec,
    anchors: AnchorSet,
    scores: Sequence[Score],
    *,
    device: str | None,
    rank: int | None,
    max_length: int,
    target: Target,
    batch_tokens: int | None,
    gradients: GradientOptions,
    reference: Description | None = None,
) -> Session:
    """The session for these settings in this process, made if there is none yet.

    Raises:
        InputError: the model or the reference cannot be loaded, or an anchor cannot be encoded.
        EvaluationError: the anchors cannot be fitted.
    """
    _tame_threads()
    device = device or default_device()
    if device == "cuda":
        device = f"cuda:{(rank or 0) % torch.cuda.device_count()}"
    # Two loaded models may be equal now and not after one is trained on: they are told apart as objects.
    which = (spec, id(registered(spec.model)) if spec.model.kind == "loaded" else None, device)
    fitted = None if reference is None else reference.fingerprint
    key = (which, anchors.content_hash, tuple(scores), max_length, target, batch_tokens, gradients, fitted)

    def make() -> Session:
        model, tokenizer = _MODELS.get_or_make(which, lambda: load(spec, device))
        engine = Engine(
            model,
            batch_tokens,
            parameters=gradients.parameters,
            energy=gradients.energy,
            gradient_checkpointing=gradients.checkpointing,
        )
        length = min(max_length, engine.context_length)
        if length < max_length:
            logger.info("max_length=%d is over the model's context; rows are cut at %d", max_length, length)
        encoder = ChatEncoder(tokenizer, length, target)
        if reference is not None:
            found = reference.load(engine, tokenizer)
        else:
            sides = {name: _encoded(encoder, side, name, engine.context_length) for name, side in anchors.sides.items()}
            if any(score.needs.harmless for score in scores):
                sides[HARMLESS] = _encoded(encoder, harmless_requests(), HARMLESS, engine.context_length)
            found = fit(engine, sides, scores, progress("Fitting anchors"))
        needs = reduce(or_, (score.row_needs(found.fitted[score.name]) for score in scores))
        return Session(engine, encoder, found, needs)

    return _SESSIONS.get_or_make(key, make)


def close_sessions() -> None:
    """Let go of fitted anchors, which may be several times as large as the model; loaded models stay."""
    _SESSIONS.clear()


def fit(engine: Engine, sides: Sides, scores: Iterable[Score], progress: Progress = iter) -> Reference:
    """Fit what rows are compared with.

    Args:
        engine: the model.
        sides: encoded anchors: `harmful`, `safe_1`, ..., and `harmless` where a score needs it.
        scores: what to fit for.
        progress: wraps the iteration over micro-batches of anchors (a progress bar).

    Raises:
        EvaluationError: an anchor's gradient or state is zero or not finite.
        InputError: a score's options do not go with these anchors.
    """
    scores = list(scores)
    needs = reduce(or_, (score.needs for score in scores))
    wanted = frozenset().union(*(score.anchor_states(engine.depth) for score in scores))
    states = engine.states(sides, wanted)
    anchors = {side: examples for side, examples in sides.items() if side != HARMLESS}
    fitted = {
        score.name: score.fit({s: x for s, x in states.items() if s in anchors or score.needs.harmless}, engine.depth)
        for score in scores
    }
    return Reference(fitted, engine.directions(anchors, needs, progress) if needs.directions else None)


def harmless_requests() -> list[Demonstration]:
    """Ordinary requests, to set against the anchors' harmful ones."""
    text = (resources.files(__package__) / "assets" / "harmless.jsonl").read_text("utf-8")
    return [json.loads(line) for line in text.splitlines()]


def _encoded(encoder: ChatEncoder, side: Iterable[Demonstration], name: str, context_length: int) -> list[Example]:
    """A side's anchors, read whole however short the rows are cut."""
    examples = []
    for i, d in enumerate(side):
        messages = ({"role": "user", "content": d["prompt"]}, {"role": "assistant", "content": d["completion"]})
        try:
            examples.append(encoder.encode(Conversation(messages), target="last_assistant", max_length=context_length))
        except UnscorableRow as reason:
            raise InputError(f"the anchor {name}[{i}] cannot be encoded: {reason}") from None
    return examples


def progress(what: str, delay: float = 0) -> Progress:
    """A progress bar that appears after `delay` seconds and vanishes when done.

    `datasets.disable_progress_bars` turns it off, and forked workers have none: `datasets.map` shows one for each already.
    """
    off = True if _process["forked"] else None
    return lambda items: tqdm(items, desc=what, delay=delay, leave=False, disable=off)


def _note_fork() -> None:
    _process["forked"] = True


if hasattr(os, "register_at_fork"):  # not on Windows, which has no fork
    os.register_at_fork(after_in_child=_note_fork)


def _tame_threads() -> None:
    """In a forked worker (`map(num_proc=...)`), compute with one thread.

    A fork does not inherit its parent's OpenMP threads, and would wait for them for ever.
    """
    if _process["forked"] and torch.get_num_threads() > 1:
        torch.set_num_threads(1)
