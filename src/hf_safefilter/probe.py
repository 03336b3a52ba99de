"""What scoring costs on this machine, measured in a process of its own on the first blocks of a model, with random weights.

`python -m hf_safefilter.probe` reads a job from standard input and prints what it measured, both as JSON. A process of its own:
its peak memory is that of scoring alone, and where the machine kills it for want of memory its parent lives on to say so.
"""

from __future__ import annotations

import copy
import json
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from .anchors import AnchorSet
from .engine.loading import DTYPES, ModelSpec, load_config, load_tokenizer
from .errors import EvaluationError, SafefilterError, first_line
from .scorer import OPTIONS, SafetyRiskScorer
from .scores.registry import score_of

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

# Rows are timed in calls of so many, more and more of them until a call takes this long.
COUNTS = (8, 16, 32, 64)
_SECONDS = 10.0


def shallow(config: PreTrainedConfig, blocks: int) -> PreTrainedConfig:
    """The configuration of the model's first blocks alone."""
    config = copy.deepcopy(config)
    text = config.get_text_config()
    whole = text.num_hidden_layers
    text.num_hidden_layers = blocks
    for name, value in vars(text).items():
        if isinstance(value, list) and len(value) == whole:  # what each block is, such as layer_types
            setattr(text, name, value[:blocks])
    return config


def measure(
    scorer: SafetyRiskScorer, device: str, blocks: int, rows: Mapping[int, Sequence[Mapping[str, Any]]]
) -> dict[str, Any]:
    """Fit and score with `blocks` random blocks in another process.

    Args:
        scorer: of a named model.
        device: where it will run.
        blocks: of the model.
        rows: by how many, the rows to time; the next of them is tried while a call takes under ten seconds.

    Returns:
        `fit_seconds`, `score_seconds`, and `timed`, the rows scored in these; bytes on the host: `empty` before the model was
        made, `model` with it, and the peaks `fit` and `score` (zero where the system does not tell); `device_fit`,
        `device_score` on a GPU.

    Raises:
        EvaluationError: the process failed; the message says why.
    """
    job = {
        "spec": asdict(scorer.spec), "device": device, "threads": torch.get_num_threads(), "blocks": blocks,
        "anchors": scorer.anchors.to_dict(), "scores": [score.key() for score in scorer.scores],
        "options": {name: getattr(scorer, name) for name in OPTIONS if name != "device"}, "rows": list(rows.items()),
    }  # fmt: skip
    done = subprocess.run([sys.executable, "-m", __name__], input=json.dumps(job), capture_output=True, text=True, check=False)
    if done.returncode:
        last = (done.stderr.strip().splitlines() or ["nothing was said"])[-1]
        why = "killed, probably for want of memory" if done.returncode == -9 else last
        raise EvaluationError(f"the trial with {blocks} of the model's blocks failed: {why}")
    return json.loads(done.stdout.splitlines()[-1])


def _run(job: dict[str, Any]) -> dict[str, Any]:
    from transformers import AutoModelForCausalLM

    torch.set_num_threads(job["threads"])
    torch.manual_seed(0)
    spec, device = ModelSpec.from_dict(job["spec"]), torch.device(job["device"])
    tokenizer, config = load_tokenizer(spec), shallow(load_config(spec), job["blocks"])
    found: dict[str, Any] = {"empty": _memory("VmRSS")}
    model = AutoModelForCausalLM.from_config(config, dtype=DTYPES[spec.dtype]).to(device).eval()
    found["model"] = _memory("VmRSS")
    scorer = SafetyRiskScorer(
        model, AnchorSet.from_dict(job["anchors"]), [score_of(key) for key in job["scores"]], tokenizer=tokenizer,
        device=job["device"], **job["options"],
    )  # fmt: skip
    with _peak(device, found, "fit"):
        found["fit_seconds"] = _timed(scorer.prepare)
    with _peak(device, found, "score"):
        _timed(scorer, job["rows"][0][1][:2])  # the first call allocates and compiles
        for count, rows in job["rows"]:
            found |= {"timed": count, "score_seconds": _timed(scorer, rows)}
            if found["score_seconds"] > _SECONDS:
                break
    return found


def _timed(call: Any, rows: Sequence[Mapping[str, Any]] | None = None) -> float:
    arguments = [] if rows is None else [{name: [row[name] for row in rows] for name in rows[0]}]
    start = time.perf_counter()
    call(*arguments)
    return time.perf_counter() - start


class _peak:
    """Notes the peak memory of a block in `found[name]`, on the host, and in `found["device_" + name]` on a GPU."""

    def __init__(self, device: torch.device, found: dict[str, Any], name: str) -> None:
        self.device, self.found, self.name = device, found, name

    def __enter__(self) -> None:
        if Path("/proc/self/clear_refs").exists():
            Path("/proc/self/clear_refs").write_text("5")  # the peak so far is forgotten
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)

    def __exit__(self, *error: object) -> None:
        self.found[self.name] = _memory("VmHWM")
        if self.device.type == "cuda":
            self.found[f"device_{self.name}"] = torch.cuda.max_memory_allocated(self.device)


def _memory(what: str) -> int:
    """This process's memory in bytes, now (VmRSS) or at its peak (VmHWM); 0 where the system does not tell."""
    status = Path("/proc/self/status")
    if not status.exists():
        return 0
    return next(int(line.split()[1]) * 1024 for line in status.read_text().splitlines() if line.startswith(what))


def main() -> int:
    """Do the job on standard input; what is wrong goes to standard error in one line."""
    try:
        print(json.dumps(_run(json.load(sys.stdin))))
    except SafefilterError as error:
        print(error, file=sys.stderr)
        return error.exit_code
    except RuntimeError as error:  # torch, out of memory
        print(first_line(error), file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
