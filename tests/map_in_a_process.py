"""Run by test_cache.py: map a scorer over a saved dataset and print how many forward passes that took."""

import json
import sys

import torch
from datasets import load_from_disk

import hf_safefilter.scorer
from hf_safefilter import SafetyRiskScorer

folder, options = sys.argv[1], json.loads(sys.argv[2])
hf_safefilter.scorer.SCORE_VERSION = options.pop("score_version", hf_safefilter.scorer.SCORE_VERSION)
num_proc = options.pop("num_proc", None)

forwards = 0


def count(module, *args):
    global forwards
    forwards += type(module).__name__ == "LlamaModel"


torch.nn.modules.module.register_module_forward_hook(count)
scorer = SafetyRiskScorer(f"{folder}/model", f"{folder}/anchors.json", dtype="float32", **options)
scored = load_from_disk(f"{folder}/rows").map(scorer, batched=True, num_proc=num_proc)
print(json.dumps({"forwards": forwards, "risk_gradient": scored["risk_gradient"][:], "cache_files": len(scored.cache_files)}))
