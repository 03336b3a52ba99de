"""One check of a model: answers to harmful prompts and to their harmless look-alikes, judged, and the refusal margin.

The callback runs it during training and `hf-safefilter monitor` runs it once. In several processes each answers a share, and
the verdict on all of them is the same everywhere, so that every process acts alike.
"""

from __future__ import annotations

import json
import logging
import math
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import zip_longest
from pathlib import Path
from typing import Any

from accelerate import PartialState
from accelerate.utils import broadcast_object_list, gather_object

from ..chat import ChatEncoder
from ..errors import InputError, first_line
from ..files import write_atomically
from ..scores.base import check_count
from ..session import progress
from .coherence import perplexities
from .generation import Answer, generate
from .judges import Judge, JudgeFunction, resolve_judge
from .margin import Margin, MarginProbe
from .metric import RefusalRate, refusal_rate
from .prompts import load_prompts, prompt_ids

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Check:
    """What one check found; `problem` says why where it could not be evaluated.

    `records` has a dict for each answer: side, prompt, completion, verdict and flags; harmful prompts also their margin and
    probability.
    `seconds` is what the check took.
    """

    harmful: RefusalRate | None = None
    benign: RefusalRate | None = None
    margin: Margin | None = None
    records: list[dict[str, Any]] = field(default_factory=list, repr=False)
    seconds: float = 0.0
    problem: str | None = None

    @property
    def rate(self) -> float | None:
        """The refusal rate on harmful prompts; `None` where it was not evaluated."""
        return self.harmful.rate if self.harmful is not None and self.problem is None else None

    def metrics(self) -> dict[str, float]:
        """Numbers for a log. A check that was not evaluated has its counts, and no rates."""
        found: dict[str, float] = {"eval_refusal_evaluated": float(self.problem is None)}
        if self.harmful is not None:
            h = self.harmful
            found |= {"eval_refusal_n": h.n, "eval_refusal_unscored": h.unscored}
            found |= {
                "eval_refusal_empty": h.empty,
                "eval_refusal_truncated": h.truncated,
                "eval_refusal_incoherent": h.incoherent,
            }
            if self.problem is None and h.rate is not None and h.attack_success_rate is not None:
                low, high = h.interval
                found |= {"eval_refusal_rate": h.rate, "eval_refusal_rate_low": low, "eval_refusal_rate_high": high}
                found |= {"eval_attack_success_rate": h.attack_success_rate}
        if self.benign is not None and self.benign.evaluated and self.benign.rate is not None and self.problem is None:
            found["eval_refusal_rate_benign"] = self.benign.rate
        found |= self.margin_metrics()
        if self.seconds:
            found["eval_refusal_runtime"] = round(self.seconds, 3)
        return found

    def margin_metrics(self) -> dict[str, float]:
        """The part of `metrics` that takes no generation."""
        if self.margin is None:
            return {}
        return {"eval_refusal_margin": self.margin.mean, "eval_refusal_probability": self.margin.probability}

    def summary(self) -> dict[str, Any]:
        """All but the records, as plain values."""
        return {
            "evaluated": self.problem is None,
            "problem": self.problem,
            "harmful": self.harmful and self.harmful.summary(),
            "benign": self.benign and self.benign.summary(),
            "margin": self.margin
            and {
                "mean": self.margin.mean,
                "interval": _finite(self.margin.interval),
                "probability": self.margin.probability,
            },
            "seconds": round(self.seconds, 2),
        }


class RefusalMonitor:
    """Prompts, a judge and openings, made ready once, to check a model with.

    Args:
        tokenizer: the model's; one without a chat template gets the fallback template, with a warning.
        prompts: harmful requests: `"default"`, a JSON-lines file or a list; see `load_prompts`.
        benign_prompts: harmless look-alikes, in the same forms; `None` for none.
        judge: see `resolve_judge`.
        max_new_tokens: where answers are cut off.
        context_length: the most tokens that the model reads.
        margin: whether to take the refusal margin too.
        openings: of the margin; see `MarginProbe`.
        batch_size: prompts at a time.
        chat_template_kwargs: passed to the chat template, such as `{"enable_thinking": False}`.

    Raises:
        InputError: unusable prompts, judge, openings or sizes.
    """

    def __init__(
        self,
        tokenizer: Any,
        prompts: Any = "default",
        benign_prompts: Any = "default",
        judge: str | Judge | JudgeFunction = "keyword",
        *,
        max_new_tokens: int = 32,
        context_length: int = 2**31,
        margin: bool = True,
        openings: Mapping[str, Sequence[str]] | None = None,
        batch_size: int = 64,
        chat_template_kwargs: Mapping[str, Any] | None = None,
    ) -> None:
        check_count("max_new_tokens", max_new_tokens)
        check_count("batch_size", batch_size)
        self.judge = resolve_judge(judge)
        self.max_new_tokens, self.batch_size = max_new_tokens, batch_size
        self.encoder = ChatEncoder(tokenizer, template_kwargs=chat_template_kwargs)
        self.conversations = {"harmful": load_prompts(prompts, "harmful")}
        if benign_prompts is not None:
            self.conversations["benign"] = load_prompts(benign_prompts, "benign")
        room = context_length - max_new_tokens
        self._sides = [(side, i) for side, conversations in self.conversations.items() for i in range(len(conversations))]
        self._ids = [prompt_ids(self.encoder, self.conversations[s][i], f"{s} prompt {i}", room) for s, i in self._sides]
        harmful = [c[:] for c in self.conversations["harmful"]]
        self._probe = MarginProbe(self.encoder, harmful, openings, batch_size=batch_size) if margin else None

    def check(self, model: Any, *, base: Any = None, perplexity: bool = True) -> Check:
        """Answer, judge, measure. Whatever fails, a check comes back: training must go on, and says what could not be told.

        Args:
            model: a loaded causal language model, plain or wrapped by peft.
            base: what it was before fine-tuning, for answers' perplexity; a peft model's own base by default.
            perplexity: whether to ask it.
        """
        started = time.perf_counter()
        answers, problem = self._answers(model)
        outcome: Check | None = None
        if problem is None:
            if PartialState().is_main_process:
                outcome = self._judged(answers, *self._perplexities(model, base, answers, perplexity))
            # One process judges, so that all have the same verdict whatever the judge is.
            outcome = broadcast_object_list([outcome])[0]
        else:
            outcome = Check(problem=problem)
        assert outcome is not None
        margin = self.margin(model)
        # The harmful prompts' records come first, in the order of their margins.
        pairs = list(zip(margin.values, margin.probabilities, strict=True)) if margin else []
        records = [
            {**record, "margin": pair and pair[0], "probability": pair and pair[1]}
            for record, pair in (zip_longest(outcome.records, pairs) if outcome.records else [])
        ]
        return Check(outcome.harmful, outcome.benign, margin, records, time.perf_counter() - started, outcome.problem)

    def margin(self, model: Any) -> Margin | None:
        """The refusal margin, each process for itself; `None`, once with a warning, where the model has none."""
        if self._probe is None:
            return None
        try:
            return self._probe(model)
        except Exception as error:  # a number to look at must not end a training run
            logger.warning("no refusal margin from here on: %s", first_line(error))
            self._probe = None
            return None

    def _answers(self, model: Any) -> tuple[list[Answer], str | None]:
        """Answers to all prompts, in every process, or why there are none."""
        state = PartialState()
        # Every process makes the same number of calls, which sharded models need: the last prompts are answered twice.
        share = math.ceil(len(self._ids) / state.num_processes)
        mine = [min(state.process_index * share + k, len(self._ids) - 1) for k in range(share)]
        try:
            found = generate(
                model, self.encoder.tokenizer, [self._ids[i] for i in mine], max_new_tokens=self.max_new_tokens,
                batch_size=self.batch_size, progress=progress("Answering monitor prompts", delay=5),
            )  # fmt: skip
            sent: list[Any] = [(i, (a.text, a.tokens, a.truncated)) for i, a in zip(mine, found, strict=True)]
        except Exception as error:  # out of memory, say: the others wait for this process, and training must go on
            sent = [(-1, f"generation failed in process {state.process_index}: {type(error).__name__}: {first_line(error)}")]
        gathered: list[Any] = gather_object(sent)
        if failed := [what for i, what in gathered if i < 0]:
            return [], failed[0]
        answers = dict(gathered)
        return [Answer(*answers[i]) for i in range(len(self._ids))], None

    def _perplexities(
        self, model: Any, base: Any, answers: list[Answer], wanted: bool
    ) -> tuple[list[float | None], str | None]:
        """Of every answer under the base model; all `None`, with the reason, where there is no base model to ask."""
        unknown: list[float | None] = [None] * len(answers)
        if not wanted:
            return unknown, None
        prompts = [self.conversations[side][i] for side, i in self._sides]
        try:
            with _base_of(model, base) as under:
                if under is None:
                    return unknown, None
                return perplexities(under, self.encoder.tokenizer, prompts, [a.text for a in answers]), None
        except Exception as error:  # a flag beside the rate: without it the rate still stands
            return unknown, f"no perplexities: {first_line(error)}"

    def _judged(self, answers: list[Answer], ppl: list[float | None], why: str | None) -> Check:
        if why:
            logger.warning(why)
        found: dict[str, RefusalRate] = {}
        records: list[dict[str, Any]] = []
        try:
            for side, conversations in self.conversations.items():
                of_side = [k for k, (s, _) in enumerate(self._sides) if s == side]
                texts = [str(c[-1]["content"]) for c in conversations]
                rate = refusal_rate(
                    [answers[k].text for k in of_side], self.judge, prompts=texts,
                    truncated=[answers[k].truncated for k in of_side], perplexity=[ppl[k] for k in of_side],
                )  # fmt: skip
                found[side] = rate
                for k, text, verdict, incoherent in zip(of_side, texts, rate.verdicts, rate.incoherences, strict=True):
                    records.append(
                        {
                            "side": side, "prompt": text, "completion": answers[k].text, "refuses": verdict.refuses,
                            "reason": verdict.reason, "tokens": answers[k].tokens, "truncated": answers[k].truncated,
                            "incoherent": incoherent, "perplexity": ppl[k], "judge": rate.judge,
                        }
                    )  # fmt: skip
        except Exception as error:  # a judge of any kind; the other processes wait for a verdict
            return Check(problem=f"the judge {self.judge.name} failed: {type(error).__name__}: {first_line(error)}")
        harmful = found["harmful"]
        problem = None if harmful.evaluated else f"{harmful.unscored} of {harmful.unscored + harmful.n} answers are unscored"
        if problem and harmful.reasons:
            problem += f", most because {next(iter(harmful.reasons))}"
        return Check(harmful, found.get("benign"), None, records, 0.0, problem)


@contextmanager
def _base_of(model: Any, base: Any) -> Iterator[Any]:
    if base is not None:
        yield base
    elif callable(getattr(model, "disable_adapter", None)):
        with model.disable_adapter():
            yield model
    else:
        yield None


def write_records(path: Path, records: Sequence[Mapping[str, Any]]) -> None:
    """Write JSON lines in one step."""
    text = "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records)
    write_atomically(path, text.encode("utf-8", "backslashreplace"))


def check_share(name: str, value: Any) -> None:
    """Raise `InputError` where `value` is neither `None` nor between 0 and 1."""
    if value is not None and (isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value <= 1):
        raise InputError(f"{name} must be between 0 and 1, got {value!r}")


def _finite(values: tuple[float, float]) -> list[float | None]:
    return [v if math.isfinite(v) else None for v in values]
