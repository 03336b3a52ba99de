"""Run by test_callback.py under `torchrun`: a training run that is watched and stopped, and what each process saw of it."""

from __future__ import annotations

import hashlib
import json
import sys
from pathlib import Path

import torch
from training import MONITOR, refusing_model, trainer

from hf_safefilter import RefusalRateCallback
from hf_safefilter.callbacks.geometry import SafetyGeometryCallback
from hf_safefilter.refusal import monitor

torch.set_num_threads(1)
folder = Path(sys.argv[1])
t = trainer(refusing_model(), folder, max_steps=40, ddp_backend="gloo")
rank = t.args.process_index
callback = RefusalRateCallback(t, **MONITOR, steps=(0,), every=1, min_refusal_rate=0.9, on_breach="stop")
t.add_callback(callback)
t.add_callback(SafetyGeometryCallback(t, MONITOR["prompts"], MONITOR["benign_prompts"], every=2))
t.train()
history = t.state.log_history
answer = monitor.generate


def short_of_memory(*args, **options):
    if rank == 1:
        raise RuntimeError("this process has no memory")
    return answer(*args, **options)


monitor.generate = short_of_memory
failed = callback.monitor.check(t.model)
digest = hashlib.sha256(b"".join(p.detach().numpy().tobytes() for p in t.model.parameters())).hexdigest()
result = {
    "processes": t.args.world_size,
    "step": t.state.global_step,
    "rates": {e["step"]: e["eval_refusal_rate"] for e in history if "eval_refusal_rate" in e},
    "margins": {e["step"]: round(e["eval_refusal_margin"], 4) for e in history if "eval_refusal_margin" in e},
    "geometry": {e["step"]: e["eval_geometry_cosine"] for e in history if "eval_geometry_cosine" in e},
    "weights": digest,
    "failed": failed.problem,
}
(folder / f"rank{rank}.json").write_text(json.dumps(result))
