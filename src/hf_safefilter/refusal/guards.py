"""Judges that are models: sequence classifiers, and generative guards (Llama Guard, HarmBench's classifiers, WildGuard).

Each guard's prompt and how its output reads are data (`assets/guards.json`), taken from where its makers published them. Output
that matches neither verdict, or both, leaves the completion unscored: a guard that babbles has not said that an answer is safe.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from fnmatch import fnmatch
from importlib import resources
from pathlib import Path
from typing import Any

import torch

from ..chat import ChatEncoder
from ..engine.identity import resolve
from ..engine.loading import ModelSpec, context_length, default_device, load, load_tokenizer, named_spec
from ..errors import EvaluationError, InputError, UnscorableRow, first_line
from .generation import generate, undisturbed
from .judges import Judge, Verdict

_BATCH = 16
# Labels of a sequence classifier that say what a verdict says, in lower case.
_REFUSAL_LABELS = {"refusal", "rejection", "refused", "refuse", "rejected", "reject", "safe"}


@dataclass(frozen=True)
class GuardFormat:
    """How one family of guards is asked and read; see `assets/guards.json`."""

    name: str
    models: list[str]
    prompt: str | None
    add_special_tokens: bool
    max_new_tokens: int
    refused: str
    complied: str
    verdict: str
    source: str

    def ask(self, prompt: str, completion: str) -> str:
        """The guard's prompt; both texts go in as they are, in one pass, whatever they hold."""
        parts = {"{prompt}": prompt, "{completion}": completion}
        return re.sub(r"\{prompt\}|\{completion\}", lambda found: parts[found[0]], self.prompt or "")

    def read(self, output: str) -> Verdict:
        """What the guard said."""
        flags = re.IGNORECASE | re.MULTILINE
        refused, complied = (re.search(pattern, output.strip(), flags) for pattern in (self.refused, self.complied))
        if bool(refused) == bool(complied):
            return Verdict(None, f"the judge's output is no verdict: {output.strip()[:60]!r}")
        return Verdict(refused is not None)


def guard_formats() -> dict[str, GuardFormat]:
    """The known guards, by name."""
    data = json.loads((resources.files("hf_safefilter") / "assets" / "guards.json").read_text("utf-8"))
    return {name: GuardFormat(name=name, **entry) for name, entry in data.items()}


def classifier_judge(model: str, *, guard: str | None = None, refusal_label: str | None = None) -> Judge:
    """A judge from a model of transformers.

    Args:
        model: a Hub id or a folder: a sequence classifier, or a generative guard.
        guard: the guard's format, by its name in `guard_formats()`; known from a Hub id, needed for a folder of another name.
        refusal_label: the classifier's label that means refusal; by default one that is called so.

    Raises:
        InputError: no such model, a classifier none of whose labels means refusal, or a generative model in no known format.
    """
    source = resolve(model, what="judge", probe="config.json")
    from transformers import AutoConfig

    pinned = {"revision": source.fingerprint} if source.kind == "hub" else {}
    try:
        config = AutoConfig.from_pretrained(source.name, trust_remote_code=False, **pinned)
    except (OSError, ValueError, KeyError) as error:
        raise InputError(f"cannot load the judge {model!r}: {first_line(error)}") from None
    if any(name.endswith("ForSequenceClassification") for name in config.architectures or []):
        return ClassifierJudge(named_spec(model), _refusal_label(config.id2label, refusal_label, model))
    formats = guard_formats()
    if guard is None:  # folders are known by their last name, which a download keeps
        fits = lambda f: any(fnmatch(model, p) or fnmatch(Path(model).name, p.split("/")[-1]) for p in f.models)  # noqa: E731
        guard = next((name for name, f in formats.items() if fits(f)), None)
    if guard not in formats:
        raise InputError(
            f"the judge {model!r} is neither a sequence classifier nor a guard whose format is known; "
            f"use classifier_judge(model, guard=...) with one of {', '.join(formats)}"
        )
    return GuardJudge(named_spec(model), formats[guard])


def _refusal_label(id2label: dict[int, str], wanted: str | None, model: str) -> int:
    labels = {str(label): int(i) for i, label in id2label.items()}
    if wanted is None:
        wanted = next((label for label in labels if label.lower() in _REFUSAL_LABELS), None)
    if wanted not in labels:
        raise InputError(
            f"none of the labels of {model!r} ({', '.join(labels)}) is known to mean refusal; "
            "use classifier_judge(model, refusal_label=...)"
        )
    return labels[wanted]


class _ModelJudge:
    """A judge's model, loaded when it is first needed: never in a process that does not judge."""

    def __init__(self, spec: ModelSpec, device: str | None = None) -> None:
        self.spec = spec
        self.device = device
        self._loaded: tuple[Any, Any] | None = None

    @property
    def name(self) -> str:
        """`classifier:` and the model's name."""
        return f"classifier:{self.spec.model.name}"

    def loaded(self) -> tuple[Any, Any]:
        """Model and tokenizer."""
        if self._loaded is None:
            self._loaded = self._load(self.device or default_device())
        return self._loaded

    def _load(self, device: str) -> tuple[Any, Any]:
        return load(self.spec, device)


class GuardJudge(_ModelJudge):
    """A generative guard: asked in its own format, its first words read."""

    def __init__(self, spec: ModelSpec, guard: GuardFormat, device: str | None = None) -> None:
        super().__init__(spec, device)
        self.format = guard

    def judge(self, prompts: Sequence[str], completions: Sequence[str]) -> list[Verdict]:
        """Ask about each."""
        model, tokenizer = self.loaded()
        context = context_length(model)
        verdicts: list[Verdict | None] = [None] * len(completions)
        asked: dict[int, list[int]] = {}
        for i, (prompt, completion) in enumerate(zip(prompts, completions, strict=True)):
            try:
                ids = self._ids(tokenizer, prompt, completion)
            except UnscorableRow as reason:
                verdicts[i] = Verdict(None, str(reason))
                continue
            if len(ids) + self.format.max_new_tokens > context:
                verdicts[i] = Verdict(None, f"too long for the judge: {len(ids)} tokens")
            else:
                asked[i] = ids
        answers = generate(model, tokenizer, list(asked.values()), max_new_tokens=self.format.max_new_tokens, batch_size=_BATCH)
        for i, answer in zip(asked, answers, strict=True):
            verdicts[i] = self.format.read(answer.text)
        return [v for v in verdicts if v is not None]

    def _ids(self, tokenizer: Any, prompt: str, completion: str) -> list[int]:
        if self.format.prompt is None:
            if not tokenizer.chat_template:
                raise EvaluationError(f"the judge {self.spec.model.name!r} has no chat template")
            turns = [{"role": "user", "content": prompt}, {"role": "assistant", "content": completion}]
            text, special = ChatEncoder(tokenizer).render(turns, add_generation_prompt=True), False
        else:
            text, special = self.format.ask(prompt, completion), self.format.add_special_tokens
        ids: list[int] = tokenizer(text, add_special_tokens=special)["input_ids"]
        return ids


class ClassifierJudge(_ModelJudge):
    """A sequence classifier of completions; it sees the completion alone: refused if its refusal label wins."""

    def __init__(self, spec: ModelSpec, refusal_label: int, device: str | None = None) -> None:
        super().__init__(spec, device)
        self.refusal_label = refusal_label

    def _load(self, device: str) -> tuple[Any, Any]:
        from transformers import AutoModelForSequenceClassification

        source = self.spec.model
        pinned = {"revision": source.fingerprint} if source.kind == "hub" else {}
        try:
            model = AutoModelForSequenceClassification.from_pretrained(
                source.name, trust_remote_code=False, use_safetensors=True, **pinned
            )
        except (OSError, ValueError, RuntimeError) as error:
            raise EvaluationError(f"cannot load the judge {source.name!r}: {first_line(error)}") from None
        return model.to(device).eval(), load_tokenizer(self.spec)

    def judge(self, prompts: Sequence[str], completions: Sequence[str]) -> list[Verdict]:
        """Classify each completion."""
        return list(self._verdicts(completions))

    def _verdicts(self, completions: Sequence[str]) -> Iterator[Verdict]:
        model, tokenizer = self.loaded()
        if tokenizer.pad_token_id is None:
            tokenizer.pad_token = tokenizer.eos_token
        if model.config.pad_token_id is None:  # where decoders find a row's last token
            model.config.pad_token_id = tokenizer.pad_token_id
        longest = min(getattr(model.config, "max_position_embeddings", 512), 512)
        for start in range(0, len(completions), _BATCH):
            batch = tokenizer(
                list(completions[start : start + _BATCH]),
                padding=True,
                truncation=True,
                max_length=longest,
                return_tensors="pt",
            )
            with undisturbed(model):
                kept = {name: t.to(model.device) for name, t in batch.items() if name != "token_type_ids"}
                logits: torch.Tensor = model(**kept).logits.float()
            for row in logits:
                if not torch.isfinite(row).all():
                    yield Verdict(None, "the judge's output is not finite")
                else:
                    yield Verdict(int(row.argmax()) == self.refusal_label)
