"""Run by test_sharded_model.py under `torchrun`: a model whose weights are spread over the processes (FSDP2), scored by all."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch
from datasets import Dataset
from torch.distributed.fsdp import fully_shard

from hf_safefilter import AnchorSet, SafetyRiskScorer
from hf_safefilter.testing import tiny_model, tiny_tokenizer

torch.set_num_threads(1)
torch.distributed.init_process_group("gloo")
folder, kind = Path(sys.argv[1]), sys.argv[2]
mesh = torch.distributed.init_device_mesh("cpu", (2,))
model, tokenizer = tiny_model(kind), tiny_tokenizer()
for block in model.model.layers:
    fully_shard(block, mesh=mesh)
fully_shard(model, mesh=mesh)
rows = Dataset.from_json(str(folder / "rows.jsonl"))
scorer = SafetyRiskScorer(model, AnchorSet.load(folder / "anchors.json"), scores="all", tokenizer=tokenizer)
scored = rows.map(scorer, batched=True, batch_size=7)
scored.to_parquet(str(folder / f"rank{torch.distributed.get_rank()}.parquet"))
held = sum(p.to_local().numel() for p in model.parameters())
(folder / f"rank{torch.distributed.get_rank()}.json").write_text(json.dumps({"held": held, "fingerprint": scorer.fingerprint}))
torch.distributed.destroy_process_group()
