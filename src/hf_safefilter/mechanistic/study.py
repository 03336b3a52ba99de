"""The whole synthetic study: pre-training, three methods at two learning rates, two harmless controls, and all analyses.

study.json                  what is compared; a resumed run must agree with it
models/seedN/NAME/          each finished model, with its tokenizer; one that is there is not trained again
analyses/seedN-NAME.json    each finished analysis; likewise
TABLE.parquet               tidy tables over all seeds: rates, separation, alignment, gain, groups, shift, attack
summary.json, *.svg         what follows for each finding, over seeds, and a picture of it (`findings.py`)
"""

from __future__ import annotations

import copy
import json
import os
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
from datasets import concatenate_datasets
from datasets.utils import tqdm

from ..engine.loading import default_device, load, named_spec
from ..errors import EvaluationError, InputError
from ..files import agree, read_json, write_atomically, write_table
from ..tuning import Recipe, Tuned
from .analyses import Row, alignment_table, cluster_separation, group_table, mlp_inputs, shift_table, update_gain
from .findings import CONTROLS, JAILBREAKS, TUNED, draw_findings, summarize
from .synthetic import KINDS, SMALL, SyntheticSetting, make_split, make_tokenizer, soft_token_attack
from .tuning import (
    LEARNING_RATES,
    PRETRAINING,
    PRETRAINING_STEPS,
    SAFETY_TUNING,
    AnswerRates,
    answer_rates,
    pretrain,
    safety_tune,
)

NAMES = ("base", *CONTROLS, *TUNED)


@dataclass(frozen=True)
class Scale:
    """How much of everything: the defaults take about half an hour on two cores.

    Args:
        pretraining, tuning: the recipes.
        rates: learning rates that are put into the latter, by size.
        pretraining_steps: steps in all epochs together.
        rows: of safety tuning, half of them safe.
        prompts: held-out prompts of each kind.
        moved: how many of these are answered at each point of the shifted update.
        alphas: those points.
        radii: of the soft-token attack's balls.
    """

    pretraining: Recipe = PRETRAINING
    tuning: Recipe = SAFETY_TUNING
    rates: Mapping[str, float] = field(default_factory=lambda: dict(LEARNING_RATES))
    pretraining_steps: int = PRETRAINING_STEPS
    rows: int = 12_800
    prompts: int = 400
    moved: int = 100
    alphas: tuple[float, ...] = (0, 0.25, 0.5, 0.75, 1, 1.1, 1.25, 1.5, 2)
    radii: tuple[float, ...] = (0.1, 0.5, 1.0)


def run_synthetic(
    out: str | Path,
    seeds: Sequence[int] = (0, 1, 2),
    *,
    setting: SyntheticSetting = SMALL,
    scale: Scale | None = None,
    workers: int = 1,
    progress: bool = True,
) -> dict[str, Any]:
    """Run what is not there yet, write the tables and figures, and return the summary.

    Args:
        out: the folder of results; a run that was cut off goes on where it was.
        seeds: of weights, training rows and their order; the held-out prompts are the same for all.
        setting: the language and size of model.
        scale: how much.
        workers: processes that share the work, each with one thread; a script needs `if __name__ == "__main__"` for more than
            one. Results do not depend on it.
        progress: whether to show a progress bar.

    Raises:
        InputError: the folder holds another study, or no seeds.
        EvaluationError: a training diverged.
    """
    scale, folder = scale or Scale(), Path(out)
    if not seeds or len(set(seeds)) < len(seeds):
        raise InputError(f"seeds must be different whole numbers, at least one; got {list(seeds)}")
    for part in ("models", "analyses"):
        (folder / part).mkdir(parents=True, exist_ok=True)
    agree(folder / "study.json", {"setting": asdict(setting), "scale": asdict(scale)})
    tables: dict[str, list[Row]] = {}
    work = 2 * len(seeds) * len(NAMES)
    with _one_thread(), _without_other_bars(), tqdm(total=work, disable=None if progress else True, unit="step") as bar:
        if workers > 1:
            _shared(folder, seeds, setting, scale, workers, bar)
        for seed in seeds:
            one = _Seed(folder, seed, setting, scale, bar)
            for name in NAMES:
                one.model(name)
            for name in NAMES:
                for table, rows in one.analyses(name).items():
                    tables.setdefault(table, []).extend({"seed": seed, "model": name, **row} for row in rows)
    for table, rows in tables.items():
        write_table(folder / f"{table}.parquet", rows)
    depth = setting.model["num_hidden_layers"]
    summary = {"seeds": list(seeds), **summarize(tables, depth)}
    write_atomically(folder / "summary.json", (json.dumps(summary, indent=1) + "\n").encode())
    draw_findings(folder, tables, depth)
    return summary


def _shared(folder: Path, seeds: Sequence[int], setting: SyntheticSetting, scale: Scale, workers: int, bar: Any) -> None:
    """Let processes make what is not there yet, and show how many models and analyses there are.

    A seed's base comes first, then its models in any order, then its analyses, which compare them.
    """
    kept = [path for seed in seeds for name in NAMES for path in _places(folder, seed, name)]
    stages = [[("model", NAMES[0])], [("model", name) for name in NAMES[1:]], [("analyses", name) for name in NAMES]]
    with ProcessPoolExecutor(workers, get_context("spawn")) as pool:
        ahead = {seed: iter(stages) for seed in seeds}
        running: dict[int, set[Future[None]]] = {seed: set() for seed in seeds}
        while running:
            for seed in list(running):
                if not running[seed]:
                    stage = next(ahead[seed], None)
                    if stage is None:
                        del running[seed]
                        continue
                    running[seed] = {pool.submit(_make, folder, seed, setting, scale, what, name) for what, name in stage}
            done, _ = wait(set().union(*running.values()), timeout=2, return_when=FIRST_COMPLETED)
            bar.n = sum(path.exists() for path in kept)
            bar.set_description(f"{workers} processes")
            for future in done:
                if future.exception():
                    pool.shutdown(cancel_futures=True)
                future.result()  # what went wrong there goes wrong here
            running = {seed: futures - done for seed, futures in running.items()}
    bar.reset()


def _make(folder: Path, seed: int, setting: SyntheticSetting, scale: Scale, what: str, name: str) -> None:
    with _one_thread(), _without_other_bars(), tqdm(disable=True) as bar:
        getattr(_Seed(folder, seed, setting, scale, bar), what)(name)


def _places(folder: Path, seed: int, name: str) -> tuple[Path, Path]:
    """Where a model is kept, and what was found of it."""
    return folder / "models" / f"seed{seed}" / name, folder / "analyses" / f"seed{seed}-{name}.json"


class _Seed:
    """One seed's models and analyses, each made once and kept."""

    def __init__(self, folder: Path, seed: int, setting: SyntheticSetting, scale: Scale, bar: Any) -> None:
        self.folder, self.seed, self.setting, self.scale, self.bar = folder, seed, setting, scale, bar
        self.tokenizer = make_tokenizer(setting)
        self.probes = {kind: make_split(kind, scale.prompts, 1, setting) for kind in KINDS if kind != "pretrain"}
        self._loaded: dict[str, Any] = {}
        self.ids = {kind: self.tokenizer(list(split["prompt"]))["input_ids"] for kind, split in self.probes.items()}

    def model(self, name: str) -> Any:
        """A model by its name, trained if it is not there."""
        if name not in self._loaded:
            self.bar.set_description(f"seed {self.seed}: {name}")
            folder = _places(self.folder, self.seed, name)[0]
            if not folder.exists():
                folder.parent.mkdir(exist_ok=True)
                made = self._pretrained() if name == "base" else self._tuned(name)
                if made.problem:
                    raise EvaluationError(f"seed {self.seed}, {name}: {made.problem}")
                with tempfile.TemporaryDirectory(dir=folder.parent) as temporary:
                    made.model.save_pretrained(Path(temporary) / name)
                    self.tokenizer.save_pretrained(Path(temporary) / name)
                    os.replace(Path(temporary) / name, folder)  # whole or not at all
            self.bar.update()
            self._loaded[name] = load(named_spec(str(folder), dtype="float32"), default_device())[0]
        return self._loaded[name]

    def analyses(self, name: str) -> dict[str, list[Row]]:
        """The tables of a model by their names, made if they are not there."""
        self.bar.set_description(f"seed {self.seed}: analyses of {name}")
        path = _places(self.folder, self.seed, name)[1]
        if not path.exists():
            found = self._of_model(self.model(name)) if name == "base" else self._of_tuned(name)
            write_atomically(path, json.dumps(found).encode())
        self.bar.update()
        kept: dict[str, list[Row]] = read_json(path)
        return kept

    def _pretrained(self) -> Tuned:
        with tempfile.TemporaryDirectory() as scratch:
            return pretrain(
                self.setting, seed=self.seed, folder=Path(scratch), steps=self.scale.pretraining_steps,
                recipe=self.scale.pretraining, progress=False,
            )  # fmt: skip

    def _tuned(self, name: str) -> Tuned:
        method, _, size = name.partition("-")
        kinds = {"benign": ("safe", "safe"), "new": ("safe", "new")}.get(name, ("safe", "unsafe"))
        # Even: the half of the texts that is not held out. Two splits of one kind differ by seed.
        splits = [make_split(k, self.scale.rows // 2, 100 + 4 * self.seed + 2 * i, self.setting) for i, k in enumerate(kinds)]
        if name in CONTROLS:
            method, size = "sft", "medium"
        recipe = replace(self.scale.tuning, learning_rate=self.scale.rates[size])
        with tempfile.TemporaryDirectory() as scratch:
            return safety_tune(
                copy.deepcopy(self.model("base")), self.tokenizer, concatenate_datasets(splits), method, size, recipe=recipe,
                seed=self.seed, folder=Path(scratch), progress=False,
            )  # fmt: skip

    def _rates(self, model: Any, count: int) -> dict[str, AnswerRates]:
        """Of the first prompts of each kind, answered together: a short batch takes as long as a full one."""
        found = answer_rates(model, self.tokenizer, concatenate_datasets([s.take(count) for s in self.probes.values()]))
        parts = {kind: slice(i * count, (i + 1) * count) for i, kind in enumerate(self.probes)}
        return {kind: AnswerRates(found.answered[part], found.refused[part]) for kind, part in parts.items()}

    def _of_model(self, model: Any) -> dict[str, list[Row]]:
        rates = self._rates(model, self.scale.prompts)
        attacks = {
            radius: soft_token_attack(model, self.tokenizer, self.probes["unsafe"], radius=radius).success
            for radius in self.scale.radii
        }
        return {
            "rates": [{"kind": kind, "instruct": r.instruct, "null": r.null, "n": r.n} for kind, r in rates.items()],
            "separation": cluster_separation(*(mlp_inputs(model, self.ids[side]) for side in ("safe", "unsafe"))),
            "attack": [{"radius": radius, "success": sum(won) / len(won), "n": len(won)} for radius, won in attacks.items()],
        }

    def _of_tuned(self, name: str) -> dict[str, list[Row]]:
        base, tuned = self.model("base"), self.model(name)
        controls = {n: self.model(n) for n in CONTROLS if n != name}
        safe, unsafe = (mlp_inputs(tuned, self.ids[side]) for side in ("safe", "unsafe"))
        rates = self._rates(tuned, self.scale.prompts)

        def measure(model: Any) -> dict[str, float]:
            found = self._rates(model, self.scale.moved)
            return {f"{of}_{kind}": getattr(r, of) for kind, r in found.items() for of in ("instruct", "null")}

        # The update put onto a model that has learned something harmless meanwhile.
        carried = shift_table(base, tuned, measure, (1,), ("all",), onto=controls["new"]) if "new" in controls else []
        return self._of_model(tuned) | {
            "alignment": alignment_table(base, tuned, controls=controls),
            "gain": update_gain(base, tuned, safe, unsafe, controls=controls),
            "groups": group_table(base, tuned, self.ids, success={kind: rates[kind].answered for kind in JAILBREAKS}),
            "shift": shift_table(base, tuned, measure, self.scale.alphas) + [row | {"part": "transplanted"} for row in carried],
        }


@contextmanager
def _one_thread() -> Iterator[None]:
    """More would round in other ways, and models this small gain nothing by them."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


@contextmanager
def _without_other_bars() -> Iterator[None]:
    """transformers shows one for each model that is loaded or saved."""
    from transformers.utils import logging

    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()
