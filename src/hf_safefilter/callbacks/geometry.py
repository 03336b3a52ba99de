"""`SafetyGeometryCallback`: the geometry of refusal while a model trains, and an alarm where it leaves what is usual.

Safety tuning moves harmful prompts into a cluster of their own (Jain et al. 2024, arXiv 2407.10264); training that makes
a model stop refusing can be seen there. Watched in what the MLPs of a few blocks read at the last prompt token, r being the
mean of harmful minus the mean of harmless prompts:

    auroc                how well the side nearer to a held-out prompt tells harmful from harmless; down: they look alike
    gap                  the difference in tau between harmless and harmful held-out prompts, in lengths of step 0's r
    cosine, norm_ratio   of r with step 0's: a low cosine: the concept moved; a low ratio: it shrank
    projection_harmful   how far harmful prompts moved along step 0's r, in lengths of it: toward -1: erased, 0: intact
    projection_benign    the same of harmless ones: above 0, with the former above 0 too: over-refusal
    gain                 |dW a| / |W a| of harmful over harmless prompts: above 1: the update aims at harmful ones, either way
"""

from __future__ import annotations

import logging
import math
import statistics
import time
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, Literal, get_args

import safetensors.torch
import torch
from accelerate.utils import broadcast_object_list
from transformers import TrainerControl, TrainerState, TrainingArguments
from transformers.pytorch_utils import Conv1D

from ..chat import ChatEncoder
from ..engine.backward import evaluation_mode
from ..engine.clusters import Clusters, auroc, check_enough, direction_drift, held_out
from ..engine.layers import blocks
from ..engine.loading import context_length
from ..engine.mlp import layer_indices, mlp_inputs, mlp_of, readers
from ..engine.updates import Update, relative_change, updates
from ..errors import EvaluationError, InputError, first_line
from ..files import write_atomically
from ..refusal.generation import undisturbed
from ..refusal.prompts import load_prompts, prompt_ids
from ..scores.base import check_count
from .band import PREFIX, SIGNALS, Band, alarms_of, read_band
from .monitoring import MonitoringCallback

logger = logging.getLogger(__name__)

OnAlarm = Literal["warn", "stop"]
BASELINE = "baseline.safetensors"
# Where the layers are, as shares of the depth. Nothing after the last is computed.
LAYERS = (0.35, 0.5, 0.65, 0.8)


class SafetyGeometryCallback(MonitoringCallback):
    """Watches the geometry of refusal while a model trains, with `Trainer` and what is built on it, such as TRL's `SFTTrainer`.

        trainer.add_callback(SafetyGeometryCallback(trainer))

    Measured before the first step, every so many steps and after the last: a forward over a few prompts, up to the last watched
    block. The weights after training are the same, bit by bit, as without it, unless it stops the run. It is no measure of
    refusals: check what an alarm says with `RefusalRateCallback`.

    Logged: each signal (see this module) as `eval_geometry_SIGNAL`, the mean over blocks, and `eval_geometry_SIGNAL_layer_L`;
    `eval_geometry_runtime` in seconds; with a band `eval_geometry_alarms`, how many signals are outside of it.

    Args:
        trainer: the trainer; without it, signals reach `log_history`, but no logger.
        prompts: harmful requests: `"default"` (built-in), a JSON-lines file or a list; see `load_prompts`.
        benign_prompts: harmless look-alikes, in the same forms.
        layers: blocks, counted from 0, or shares of the depth; by default four, see `LAYERS`.
        every: measure every so many steps.
        max_prompts: so many of each are used, evenly spaced; `None`: all.
        band: what harmless training does, from `benign_band`, or its JSON file; without one there are no alarms. An alarm is a
            change from step 0 further than `sds` standard deviations outside of what lies between 0 and the band's mean.
        sds: how many.
        on_alarm: `"warn"`: say so; `"stop"`: save a checkpoint and stop.
        batch_size: prompts at a time.
        output_dir: where `history.jsonl` is kept; by default `geometry_checks` in the trainer's output folder.
        tokenizer: by default the trainer's.
        chat_template_kwargs: passed to the chat template, such as `{"enable_thinking": False}`.

    Raises:
        InputError: unusable prompts, layers or band, an unknown `on_alarm`; with `trainer` also what does not go with its model
            or arguments. Without it, that comes when training begins.
    """

    folder_name: ClassVar[str] = "geometry_checks"
    content: ClassVar[str] = "geometry"

    def __init__(
        self,
        trainer: Any = None,
        prompts: Any = "default",
        benign_prompts: Any = "default",
        layers: Sequence[float] | None = None,
        every: int = 10,
        *,
        max_prompts: int | None = 32,
        band: Band | str | Path | None = None,
        sds: float = 3.0,
        on_alarm: OnAlarm = "warn",
        batch_size: int = 32,
        output_dir: str | Path | None = None,
        tokenizer: Any = None,
        chat_template_kwargs: Mapping[str, Any] | None = None,
    ) -> None:
        super().__init__(trainer, output_dir)
        if on_alarm not in get_args(OnAlarm):
            raise InputError(f"on_alarm must be one of {', '.join(get_args(OnAlarm))}, got {on_alarm!r}")
        for name, value in (("every", every), ("batch_size", batch_size), ("max_prompts", max_prompts or 1)):
            check_count(name, value)
        if isinstance(sds, bool) or not isinstance(sds, int | float) or not 0 < sds < math.inf:
            raise InputError(f"sds must be a number above 0, got {sds!r}")
        self.band = None if band is None else read_band(band)
        if on_alarm == "stop" and self.band is None:
            raise InputError("on_alarm='stop' needs band=..., what harmless training does; see benign_band")
        self.layers, self.every, self.sds, self.on_alarm, self.batch_size = layers, every, sds, on_alarm, batch_size
        self._conversations = {
            "harmful": _spread(load_prompts(prompts, "harmful"), max_prompts),
            "benign": _spread(load_prompts(benign_prompts, "benign"), max_prompts),
        }
        check_enough({f"{side} prompts": len(c) for side, c in self._conversations.items()})
        self._tokenizer, self._template_kwargs = tokenizer, chat_template_kwargs
        self._ids: list[list[int]] | None = None
        self._chosen: list[int] = []
        self._means: dict[int, dict[str, torch.Tensor]] = {}
        self._weights: dict[int, list[tuple[Any, torch.Tensor]]] | None = {}
        self._start: Mapping[str, Any] = {}
        self._alarmed: set[str] = set()
        if trainer is not None:
            self._prepare(trainer.args, trainer.model, tokenizer or trainer.processing_class)

    # Events, in the order of a run.

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, model: Any = None,
        processing_class: Any = None, **_: Any,
    ) -> None:  # fmt: skip
        """Measure before the first step; what comes later is compared with this."""
        if self._ids is None:
            self._prepare(args, model, self._tokenizer or processing_class)
        self._open_folder(args, state)
        self._checkpoint_due, self._alarmed = False, set()
        self._remember(state, model)
        if state.global_step == 0 or not self._start:
            found, problem = self._measured(model)
            if problem:
                raise EvaluationError(f"the geometry of refusal cannot be measured: {problem}")
            self._start = found
            self._say(dict(self._start), model, state, control)
            self._save_baseline(state)

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, model: Any = None, **_: Any
    ) -> None:
        """Measure where this step asks for it, or is the last."""
        if state.global_step % self.every and state.global_step < state.max_steps and not control.should_training_stop:
            return
        found, problem = self._measured(model)
        if problem:
            logger.warning("step %d: geometry not measured: %s", state.global_step, problem)
            return
        alarms = alarms_of(self.band, found, self._start, self.sds) if self.band is not None else {}
        if self.band is not None:
            found[f"{PREFIX}alarms"] = len(alarms)
        self._say(found, model, state, control, alarms)
        if new := alarms.keys() - self._alarmed:
            self._alarmed |= new
            what = "; ".join(f"{signal} {alarms[signal]}" for signal in SIGNALS if signal in alarms)
            ending = ": saving a checkpoint and stopping" if self.on_alarm == "stop" else ""
            logger.warning(
                "step %d: training moves the geometry of refusal more than harmless training does: %s%s",
                state.global_step, what, ending,
            )  # fmt: skip
            if self.on_alarm == "stop":
                self._save_and_stop(control)

    def on_train_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Let go of the weights that were kept."""
        self._weights = {}

    # What events do.

    def _measured(self, model: Any) -> tuple[dict[str, float], str | None]:
        """Every signal, or why not: the first process's, so that all act alike."""
        try:
            found, problem = self._measure(model), None
        except Exception as error:  # numbers to look at must not end a training run
            found, problem = {}, first_line(error)
        outcome: tuple[dict[str, float], str | None] = broadcast_object_list([(found, problem)])[0]
        return outcome

    def _measure(self, model: Any) -> dict[str, float]:
        """Every signal, by layer and as the mean over layers."""
        assert self._ids is not None
        started = time.perf_counter()
        with undisturbed(model), self._precision():
            x = mlp_inputs(model, self._ids, self._chosen, self.batch_size)
        changed = self._updates(model)
        count = len(self._conversations["harmful"])
        by_layer = {}
        for layer in self._chosen:
            harmful, benign = x[layer][:count], x[layer][count:]
            means = self._means.setdefault(layer, {"harmful": harmful.mean(dim=0), "benign": benign.mean(dim=0)})
            by_layer[layer] = _signals(harmful, benign, means) | _gain(changed.get(layer), harmful, benign)
        found: dict[str, float] = {}
        for signal in SIGNALS:
            values = {layer: of[signal] for layer, of in by_layer.items() if signal in of}
            if values:
                found[f"{PREFIX}{signal}"] = statistics.mean(values.values())
                found |= {f"{PREFIX}{signal}_layer_{layer}": value for layer, value in values.items()}
        return found | {f"{PREFIX}runtime": round(time.perf_counter() - started, 3)}

    def _updates(self, model: Any) -> dict[int, list[Update]]:
        """The update of the matrices that read each watched MLP's input; none where it is not known."""
        if self._weights is None:
            return {}
        if not self._weights:  # LoRA: the base is still there
            found = updates(None, model, self._chosen, "mlp_in")
            return {layer: [u for u in found if u.layer == layer] for layer in self._chosen}
        return {layer: [_since(module, before, layer) for module, before in kept] for layer, kept in self._weights.items()}

    def _say(
        self, found: dict[str, float], model: Any, state: TrainerState, control: TrainerControl, alarms: Iterable[str] = ()
    ) -> None:
        with evaluation_mode(model):  # TRL's trainers tell logs of training and of evaluation apart by the model's mode
            self._report(found, state, control)
        self._keep(state, {**found, "alarms": sorted(alarms)})

    def _prepare(self, args: TrainingArguments, model: Any, tokenizer: Any) -> None:
        tokenizer = self._tokenizer_of(tokenizer)
        if getattr(model, "config", None) is None or not hasattr(model, "get_decoder"):
            raise InputError(f"{type(model).__name__} is no causal language model")
        self._check_reach(args, "geometry")
        plugins = getattr(getattr(self.trainer, "accelerator", None), "state", None)
        zero3 = getattr(getattr(plugins, "deepspeed_plugin", None), "zero_stage", 0) == 3
        if zero3 or getattr(plugins, "fsdp_plugin", None) is not None or self._sharded(args):
            raise InputError("geometry needs whole layers; with sharded weights (FSDP, ZeRO-3) use RefusalRateCallback")
        self._check_writable(args)
        depth = len(blocks(model))
        self._chosen = layer_indices(LAYERS if self.layers is None else self.layers, depth)
        for layer in self._chosen:
            mlp_of(blocks(model)[layer])
        encoder, room = ChatEncoder(tokenizer, template_kwargs=self._template_kwargs), context_length(model)
        self._ids = [
            prompt_ids(encoder, conversation, f"{side} prompt {i}", room)
            for side, conversations in self._conversations.items()
            for i, conversation in enumerate(conversations)
        ]

    def _remember(self, state: TrainerState, model: Any) -> None:
        """What step 0 was: weights that training will change, and of a resumed run what was measured then."""
        self._means, self._start = {}, {}
        self._weights = self._kept_weights(state, model)
        if state.global_step == 0:
            return
        file = None if self._folder is None else self._folder / BASELINE
        try:
            if file is None or not self.history:
                raise FileNotFoundError(2, "no history")
            for key, value in safetensors.torch.load_file(file).items():
                layer, side = key.split("/")
                self._means.setdefault(int(layer), {})[side] = value
            if sorted(self._means) != self._chosen:
                raise ValueError("it is of other layers")
            self._start = self.history[0]
        except (OSError, ValueError, safetensors.SafetensorError) as error:
            logger.warning("resumed, and step 0's geometry is not known (%s): changes count from here", first_line(error))
            self._means, self.history = {}, []
        # The first process has the history.
        self._means, self._start = broadcast_object_list([(self._means, self._start)])[0]

    def _save_baseline(self, state: TrainerState) -> None:
        if state.is_world_process_zero and self._folder is not None:
            tensors = {f"{layer}/{side}": x.contiguous() for layer, of in self._means.items() for side, x in of.items()}
            write_atomically(self._folder / BASELINE, safetensors.torch.save(tensors))

    def _kept_weights(self, state: TrainerState, model: Any) -> dict[int, list[tuple[Any, torch.Tensor]]] | None:
        """Copies of the watched matrices; empty where LoRA leaves them alone, `None` where the update cannot be known."""
        try:
            matrices = {layer: readers(mlp_of(blocks(model)[layer])) for layer in self._chosen}
            plain = {layer: [m for m in of if not hasattr(m, "base_layer")] for layer, of in matrices.items()}
            if not any(m.weight.requires_grad for of in plain.values() for m in of):
                updates(None, model, self._chosen, "mlp_in")
                return {}
        except InputError as error:
            logger.warning("no update gain: %s", first_line(error))
            return None
        if state.global_step:
            logger.warning("no update gain: this run was resumed, and the weights of step 0 are not here")
            return None
        return {layer: [(m, m.weight.detach().clone()) for m in of] for layer, of in plain.items()}


def _signals(harmful: torch.Tensor, benign: torch.Tensor, start: Mapping[str, torch.Tensor]) -> dict[str, float]:
    """All signals but the gain, of activations [prompts, hidden] and the means [hidden] of step 0."""
    clusters = Clusters.of(benign, harmful)
    tau_benign, tau_harmful = clusters.tau(held_out(benign)), clusters.tau(held_out(harmful))
    length = float((start["harmful"] - start["benign"]).norm())
    (drift,) = direction_drift(
        ({0: start["benign"][None]}, {0: start["harmful"][None]}), ({0: benign}, {0: harmful})
    )  # fmt: skip
    found = {
        "auroc": auroc(tau_benign, tau_harmful),
        "gap": float(tau_benign.mean() - tau_harmful.mean()) / length if length else None,
        "cosine": drift["cosine"], "norm_ratio": drift["norm_ratio"],
        "projection_harmful": drift["projection_unsafe"], "projection_benign": drift["projection_safe"],
    }  # fmt: skip
    return {name: float(value) for name, value in found.items() if value is not None}


def _gain(of_layer: Sequence[Update] | None, harmful: torch.Tensor, benign: torch.Tensor) -> dict[str, float]:
    if not of_layer:
        return {}
    usual = float(relative_change(of_layer, benign).mean())
    return {"gain": float(relative_change(of_layer, harmful).mean()) / usual} if usual else {}


def _since(module: Any, before: torch.Tensor, layer: int) -> Update:
    """The update of a layer's weights since they were `before`."""

    def turned(x: torch.Tensor) -> torch.Tensor:
        return x.T.float() if isinstance(module, Conv1D) else x.float()

    return Update("", layer, turned(before), None, lambda: turned(module.weight.detach()) - turned(before))


def _spread(items: list[Any], count: int | None) -> list[Any]:
    """At most so many, evenly spaced."""
    if count is None or count >= len(items):
        return items
    return [items[i * len(items) // count] for i in range(count)]
