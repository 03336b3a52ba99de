"""What the monitoring callbacks share: reporting to the trainer without disturbing it, a folder with a history, a stop that is
saved."""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any, ClassVar

from accelerate.utils import broadcast_object_list
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from ..errors import InputError
from ..refusal.monitor import write_records

logger = logging.getLogger(__name__)

HISTORY = "history.jsonl"


class MonitoringCallback(TrainerCallback):
    """Base of callbacks that measure a model while it trains.

    `history` holds a dict for every measurement, also written to `history.jsonl` in the callback's folder.

    Attributes:
        folder_name: of the folder in the trainer's output folder.
        content: what is kept there, in messages.
    """

    folder_name: ClassVar[str]
    content: ClassVar[str]

    def __init__(self, trainer: Any, output_dir: str | Path | None) -> None:
        self.trainer = trainer
        self.output_dir = None if output_dir is None else Path(output_dir)
        self.history: list[dict[str, Any]] = []
        self._folder: Path | None = None
        self._checkpoint_due = False

    def on_epoch_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Ask again for a checkpoint that was due: save_strategy="best" had the last word in the step."""
        control.should_save |= self._checkpoint_due

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """The checkpoint is there."""
        self._checkpoint_due = False

    def _save_and_stop(self, control: TrainerControl) -> None:
        control.should_training_stop = control.should_save = self._checkpoint_due = True

    def _report(self, metrics: Mapping[str, float], state: TrainerState, control: TrainerControl) -> None:
        """To the trainer's loggers and `log_history`."""
        if self.trainer is not None:
            flag = control.should_log  # logging clears it, and the step's own loss would go unlogged
            self.trainer.log(dict(metrics))
            control.should_log = self.trainer.control.should_log = flag
        else:
            state.log_history.append({**metrics, "epoch": state.epoch, "step": state.global_step})

    def _keep(
        self, state: TrainerState, entry: Mapping[str, Any], files: Mapping[str, Sequence[Mapping[str, Any]]] | None = None
    ) -> None:
        """Add to the history, and write it and `files` (JSON lines by name), on the first process."""
        if not state.is_world_process_zero or self._folder is None:
            return
        self.history.append({"step": state.global_step, "epoch": state.epoch, **entry})
        try:
            for name, records in (files or {}).items():
                write_records(self._folder / name, records)
            write_records(self._folder / HISTORY, self.history)
        except OSError as error:  # a disk that filled up: the training matters more than our files
            logger.warning("step %d: %s not saved: %s", state.global_step, self.content, error)

    def _precision(self) -> Any:
        """The trainer's own mixed precision, opened once: casts of weights are then kept from one forward to the next."""
        return self.trainer.accelerator.autocast() if self.trainer is not None else nullcontext()

    def _tokenizer_of(self, tokenizer: Any) -> Any:
        tokenizer = getattr(tokenizer, "tokenizer", tokenizer)  # a processor's
        if tokenizer is None:
            raise InputError("the trainer has no tokenizer: give it processing_class=..., or this callback tokenizer=...")
        return tokenizer

    def _check_reach(self, args: TrainingArguments, what: str) -> None:
        """Say what does not get there without a trainer."""
        name = type(self).__name__
        if self.trainer is None and args.world_size > 1:
            raise InputError(f"several processes: make it {name}(trainer, ...) and trainer.add_callback it")
        if self.trainer is None and args.report_to:
            logger.warning(
                "%s will not reach %s: make it %s(trainer, ...) and trainer.add_callback it",
                what, ", ".join(args.report_to), name,
            )  # fmt: skip

    def _sharded(self, args: TrainingArguments) -> bool:
        plugin = getattr(args, "deepspeed_plugin", None)
        return bool(args.fsdp) or (plugin is not None and plugin.zero_stage == 3)

    def _where(self, args: TrainingArguments) -> Path | None:
        return self.output_dir or (None if args.output_dir is None else Path(str(args.output_dir)) / self.folder_name)

    def _check_writable(self, args: TrainingArguments) -> None:
        if folder := self._where(args):
            above = next(p for p in (folder, *folder.absolute().parents) if p.exists())
            if not (above.is_dir() and os.access(above, os.W_OK)):
                raise InputError(f"{self.content} cannot be written to {str(folder)!r}; choose output_dir=...")

    def _open_folder(self, args: TrainingArguments, state: TrainerState) -> None:
        """Make the folder, and take over what an interrupted run has left there."""
        self.history, self._folder = [], self._where(args)
        if self._folder is None:
            return
        problem = None
        if state.is_world_process_zero:
            try:
                self._folder.mkdir(parents=True, exist_ok=True)
                file = self._folder / HISTORY
                past = file.read_text("utf-8").splitlines() if state.global_step and file.exists() else []
                self.history = [e for e in map(json.loads, past) if e["step"] <= state.global_step]
                write_records(file, self.history)
            except (OSError, ValueError) as error:
                problem = f"{self.content} cannot be written to {str(self._folder)!r}: {error}; choose output_dir=..."
        # All processes stop, or none.
        if problem := broadcast_object_list([problem])[0]:
            raise InputError(problem)
