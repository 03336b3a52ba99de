"""`RefusalRateCallback`: refusals in the logs of a training run, and what to do when they fall."""

from __future__ import annotations

import logging
import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, Literal, get_args

import torch
from transformers import EarlyStoppingCallback, TrainerControl, TrainerState, TrainingArguments

from ..engine.backward import evaluation_mode
from ..engine.loading import context_length
from ..errors import InputError
from ..refusal.judges import Judge, JudgeFunction, resolve_judge
from ..refusal.monitor import Check, RefusalMonitor, check_share
from ..refusal.prompts import load_prompts
from ..scores.base import check_count
from .monitoring import MonitoringCallback

logger = logging.getLogger(__name__)

OnBreach = Literal["warn", "stop", "restore"]
RATE = "eval_refusal_rate"


class RefusalRateCallback(MonitoringCallback):
    """Measures refusals while a model trains, with `Trainer` and what is built on it, such as TRL's `SFTTrainer`.

        trainer.add_callback(RefusalRateCallback(trainer, min_refusal_rate=0.9, on_breach="stop"))

    A check answers harmful prompts and their harmless look-alikes greedily, judges the answers and takes the refusal margin. It
    is made before the first step, after the steps named, and at every evaluation; the margin alone, which is cheap, more often.
    The weights after training are the same, bit by bit, as without it, unless it stops the run.

    Logged (TensorBoard shows `eval_x` as `eval/x`): `eval_refusal_rate` with `_low` and `_high` (Wilson 95%), `eval_refusal_n`,
    `_unscored`, `_empty`, `_truncated`, `_incoherent`, `_evaluated` (1 or 0), `_margin`, `_probability`, `_runtime` (s),
    `eval_attack_success_rate`, and `eval_refusal_rate_benign`. All go to `log_history` and the trainer's loggers. At
    evaluations they are among the metrics, so `metric_for_best_model="eval_refusal_rate"` with `greater_is_better=True`
    works; there a check that could not be evaluated is NaN: never the best, and to early stopping no improvement.

    Args:
        trainer: the trainer; without it, metrics reach `log_history` and evaluations, but no logger, and a model in
            several processes cannot be checked.
        prompts: harmful requests: `"default"` (64 built-in), a JSON-lines file or a list; see `load_prompts`.
        benign_prompts: harmless look-alikes, in the same forms; `None` for none.
        judge: `"keyword"`, `"keyword_prefix"`, `"classifier:MODEL"` or a function; see `resolve_judge`.
        steps: optimizer steps after which to check; 0 is before training.
        every: check every so many steps too.
        max_new_tokens: where answers are cut off.
        min_refusal_rate: the threshold, 0 to 1: a check whose rate is under it is a breach.
        on_breach: `"warn"`: say so; `"stop"`: save a checkpoint and stop; `"restore"`: put back the weights of the last check
            that held the threshold (those that are trained are kept, in memory) and stop.
        margin_every: take the margin every so many steps; `None`: with checks only.
        openings: of the margin; see `MarginProbe`.
        batch_size: prompts at a time.
        output_dir: where answers are kept, one JSON-lines file a check, and `history.jsonl`; by default `refusal_checks` in the
            trainer's output folder.
        tokenizer: by default the trainer's.
        chat_template_kwargs: passed to the chat template, such as `{"enable_thinking": False}`.
        max_sharded_parameters: with DeepSpeed ZeRO-3 every token of an answer gathers all weights once; larger models are
            refused.

    Raises:
        InputError: an unknown `on_breach` or judge, a threshold outside 0 to 1, unusable prompts; with `trainer` also what does
            not go with its model or its arguments. Without it, that comes when training begins.
    """

    folder_name: ClassVar[str] = "refusal_checks"
    content: ClassVar[str] = "answers"

    def __init__(
        self,
        trainer: Any = None,
        prompts: Any = "default",
        benign_prompts: Any = "default",
        judge: str | Judge | JudgeFunction = "keyword",
        steps: Iterable[int] = (0, 1, 2, 5, 10),
        every: int | None = None,
        max_new_tokens: int = 32,
        min_refusal_rate: float | None = None,
        on_breach: OnBreach = "warn",
        *,
        margin_every: int | None = 10,
        openings: Mapping[str, Sequence[str]] | None = None,
        batch_size: int = 64,
        output_dir: str | Path | None = None,
        tokenizer: Any = None,
        chat_template_kwargs: Mapping[str, Any] | None = None,
        max_sharded_parameters: float = 20e9,
    ) -> None:
        if on_breach not in get_args(OnBreach):
            raise InputError(f"on_breach must be one of {', '.join(get_args(OnBreach))}, got {on_breach!r}")
        check_share("min_refusal_rate", min_refusal_rate)
        if on_breach != "warn" and min_refusal_rate is None:
            raise InputError(f"on_breach={on_breach!r} needs min_refusal_rate, the threshold")
        for name, value in (("every", every), ("margin_every", margin_every)):
            if value is not None:
                check_count(name, value)
        check_count("max_new_tokens", max_new_tokens)
        check_count("batch_size", batch_size)
        self.steps = frozenset(steps)
        if bad := [s for s in self.steps if not isinstance(s, int) or isinstance(s, bool) or s < 0]:
            raise InputError(f"steps must be whole numbers of at least 0, got {bad[0]!r}")
        super().__init__(trainer, output_dir)
        self.every, self.margin_every = every, margin_every
        self.min_refusal_rate, self.on_breach = min_refusal_rate, on_breach
        self.max_sharded_parameters = max_sharded_parameters
        self._tokenizer = tokenizer
        # Read and checked now, whether or not the model is known yet.
        self._options: dict[str, Any] = {
            "prompts": load_prompts(prompts, "harmful"),
            "benign_prompts": None if benign_prompts is None else load_prompts(benign_prompts, "benign"),
            "judge": resolve_judge(judge),
            "max_new_tokens": max_new_tokens,
            "openings": openings,
            "batch_size": batch_size,
            "chat_template_kwargs": chat_template_kwargs,
        }
        self.monitor: RefusalMonitor | None = None
        self._latest: tuple[int, Check] | None = None
        self._safe: tuple[int, dict[str, torch.Tensor]] | None = None
        self._training = False
        if trainer is not None:
            self._prepare(trainer.args, trainer.model, tokenizer or trainer.processing_class)

    # Events, in the order of a run.

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, model: Any = None,
        processing_class: Any = None, **_: Any,
    ) -> None:  # fmt: skip
        """Check the arguments, go before early stopping, and make the check of step 0."""
        if self.monitor is None:
            self._prepare(args, model, self._tokenizer or processing_class)
        else:
            self._check_arguments(args)
        self._go_first()
        self._latest = self._safe = None
        self._training, self._checkpoint_due = True, False
        self._open_folder(args, state)
        # Resumed: where weights are to be put back, there must be some to put back.
        if (state.global_step == 0 and 0 in self.steps) or self.on_breach == "restore":
            check = self._check(args, state, control, model)
            if self.on_breach == "warn":
                self._act(check, control, model, state.global_step)
            elif check.rate is not None and self._is_breach(check.rate):
                raise InputError(
                    f"the model refuses {check.rate:.1%} of the harmful prompts before training, under "
                    f"min_refusal_rate={self.min_refusal_rate}: there is nothing to protect; lower it, or align the model first"
                )

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, model: Any = None, **_: Any
    ) -> None:
        """Check, or take the margin, where this step asks for it."""
        step = state.global_step
        if step in self.steps or (self.every and step % self.every == 0):
            self._act(self._check(args, state, control, model), control, model, step)
        elif self.margin_every and step % self.margin_every == 0 and self.monitor is not None:
            with evaluation_mode(model), self._precision():
                margin = self.monitor.margin(model)
                if margin is not None:
                    self._log(Check(margin=margin).margin_metrics(), state, control)

    def on_evaluate(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, metrics: dict[str, float] | None = None,
        model: Any = None, processing_class: Any = None, **_: Any,
    ) -> None:  # fmt: skip
        """Check, unless this step has been (several evaluation datasets), and add to the evaluation's metrics."""
        if self.monitor is None:  # evaluate() without train()
            self._prepare(args, model, self._tokenizer or processing_class)
        if self._folder is None:
            self._open_folder(args, state)
        # Outside of training weights may have become others at the same step.
        latest = self._latest if self._training else None
        fresh = latest is None or latest[0] != state.global_step
        check = self._check(args, state, control, model) if latest is None or fresh else latest[1]
        if metrics is not None:
            # Named in every evaluation: the trainer looks its best metric up without asking.
            metrics.update({RATE: math.nan, **check.metrics()})
        if fresh:
            self._act(check, control, model, state.global_step)

    def on_train_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Let go of what was kept."""
        self._latest = self._safe = None
        self._training = False

    # What events do.

    def _check(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, model: Any) -> Check:
        assert self.monitor is not None
        # TRL's trainers tell logs of training and of evaluation apart by the model's mode.
        with evaluation_mode(model), self._precision():
            check = self.monitor.check(model, perplexity=not self._sharded(args))
            self._latest = (state.global_step, check)
            if check.problem:
                logger.warning("step %d: refusals not evaluated: %s", state.global_step, check.problem)
            self._log(check.metrics(), state, control, check)
        if check.rate is not None and not self._is_breach(check.rate) and self.on_breach == "restore":
            kept = {name: p.detach().to("cpu", copy=True) for name, p in model.named_parameters() if p.requires_grad}
            self._safe = (state.global_step, kept)
        return check

    def _act(self, check: Check, control: TrainerControl, model: Any, step: int) -> None:
        if check.rate is None or not self._is_breach(check.rate):
            return
        what = f"step {step}: the model refuses {check.rate:.1%} of harmful prompts, under {self.min_refusal_rate:.1%}"
        if self.on_breach == "warn":
            logger.warning("%s", what)
            return
        control.should_training_stop = True
        if self.on_breach == "stop":
            logger.warning("%s: saving a checkpoint and stopping", what)
            self._save_and_stop(control)
        elif self._safe is None:
            logger.warning("%s: stopping; no check held the threshold, so there are no weights to put back", what)
        else:
            safe_step, kept = self._safe
            logger.warning("%s: putting back the weights of step %d and stopping", what, safe_step)
            with torch.no_grad():
                for name, p in model.named_parameters():
                    if name in kept:
                        p.copy_(kept[name])
            self._latest = None  # an evaluation that still comes measures what was put back

    def _is_breach(self, rate: float) -> bool:
        return self.min_refusal_rate is not None and rate < self.min_refusal_rate

    def _log(self, metrics: dict[str, float], state: TrainerState, control: TrainerControl, check: Check | None = None) -> None:
        """To the trainer's loggers and `log_history`, and to our own files on the first process."""
        self._report(metrics, state, control)
        if check is None:
            self._keep(state, metrics)
        else:
            entry = {**metrics, "problem": check.problem, "judge": check.harmful and check.harmful.judge}
            self._keep(state, entry, {f"step-{state.global_step:08d}.jsonl": check.records})

    # What must hold before anything is measured.

    def _prepare(self, args: TrainingArguments, model: Any, tokenizer: Any) -> None:
        tokenizer = self._tokenizer_of(tokenizer)
        if getattr(model, "config", None) is None or not hasattr(model, "generate"):
            raise InputError(f"{type(model).__name__} cannot generate text; refusals are measured on causal language models")
        self._check_arguments(args)
        self._check_writable(args)
        self.monitor = RefusalMonitor(tokenizer, **self._options, context_length=context_length(model))

    def _check_arguments(self, args: TrainingArguments) -> None:
        self._check_reach(args, "refusals")
        if self.on_breach == "restore":
            if self._sharded(args):
                raise InputError("on_breach='restore' does not go with sharded weights (FSDP, ZeRO-3); use 'stop'")
            best = args.metric_for_best_model
            if args.load_best_model_at_end and f"eval_{(best or '').removeprefix('eval_')}" != RATE:
                raise InputError(
                    f"load_best_model_at_end would undo on_breach='restore': it loads the best {best}; turn it off, or use "
                    "metric_for_best_model='eval_refusal_rate'"
                )
        accelerator = getattr(self.trainer, "accelerator", None)
        plugin = getattr(getattr(accelerator, "state", None), "deepspeed_plugin", None)
        if plugin is not None and plugin.zero_stage == 3:
            # Under ZeRO-3 a process holds empty parameters, which remember their size.
            size = sum(getattr(p, "ds_numel", p.numel()) for p in self.trainer.model.parameters())
            if size > self.max_sharded_parameters:
                raise InputError(
                    f"answering with {size / 1e9:.0f} B parameters under ZeRO-3 gathers all of them for every token; raise "
                    f"max_sharded_parameters (now {self.max_sharded_parameters / 1e9:.0f} B) if you want that"
                )
        fsdp = getattr(getattr(accelerator, "state", None), "fsdp_plugin", None)
        if fsdp is not None and getattr(fsdp, "fsdp_version", 1) == 1:
            raise InputError("FSDP version 1 cannot generate inside training; use fsdp_version: 2")

    def _go_first(self) -> None:
        """Early stopping reads its metric in its own `on_evaluate`: it must come after ours."""
        handler = getattr(self.trainer, "callback_handler", None)
        if handler is None or self not in handler.callbacks:
            return
        others = [callback for callback in handler.callbacks if callback is not self]
        place = next((i for i, c in enumerate(others) if isinstance(c, EarlyStoppingCallback)), None)
        if place is not None and place < handler.callbacks.index(self):
            # A new list: this event is on its way through the old one.
            handler.callbacks = [*others[:place], self, *others[place:]]
