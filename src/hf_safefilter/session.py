"""What a process holds to score with: loaded models, and anchors encoded and fitted on them.

Sessions are looked up by what they depend on, so that every copy of a scorer in a process, pickled or not, shares one.
"""

from __future__ import annotations

import logging
import os
from collections import OrderedDict
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from datasets.utils import tqdm

from .anchors import AnchorSet, Demonstration
from .chat import ChatEncoder, Example, Target
from .engine.loading import ModelSpec, default_device, load, registered
from .engine.passes import Engine, Needs, Progress, Reference
from .errors import InputError, UnscorableRow
from .formats import Conversation

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Session:
    """A model that is ready to score rows."""

    engine: Engine
    encoder: ChatEncoder
    reference: Reference


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
    needs: Needs,
    *,
    device: str | None,
    rank: int | None,
    max_length: int,
    target: Target,
    batch_tokens: int | None,
) -> Session:
    """The session for these settings in this process, made if there is none yet.

    Raises:
        InputError: the model cannot be loaded, or an anchor cannot be encoded.
        EvaluationError: the anchors cannot be fitted.
    """
    _tame_threads()
    device = device or default_device()
    if device == "cuda":
        device = f"cuda:{(rank or 0) % torch.cuda.device_count()}"
    # Two loaded models may be equal now and not after one is trained on: they are told apart as objects.
    which = (spec, id(registered(spec.model)) if spec.model.kind == "loaded" else None, device)
    key = (which, anchors.content_hash, needs, max_length, target, batch_tokens)

    def make() -> Session:
        model, tokenizer = _MODELS.get_or_make(which, lambda: load(spec, device))
        engine = Engine(model, batch_tokens)
        length = min(max_length, engine.context_length)
        if length < max_length:
            logger.info("max_length=%d is over the model's context; rows are cut at %d", max_length, length)
        encoder = ChatEncoder(tokenizer, length, target)
        sides = {name: _encoded(encoder, side, name, engine.context_length) for name, side in anchors.sides.items()}
        return Session(engine, encoder, engine.fit(sides, needs, progress("Fitting anchors")))

    return _SESSIONS.get_or_make(key, make)


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
