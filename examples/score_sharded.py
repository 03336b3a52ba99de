"""Score with a model that no single device holds: its weights are spread over processes with FSDP2.

torchrun --nproc_per_node 8 examples/score_sharded.py --model org/model-70b --data ROWS --parameters last-4 --out OUT.parquet

Every process scores the same rows, because each layer's weights are gathered from all of them: memory is spread, not work. The
first process reads the whole model into the host's memory once. Run by us with two processes on a CPU, not on GPUs.
"""

from __future__ import annotations

import argparse
import os
from typing import Any

import torch
import torch.distributed as dist
from accelerate import init_empty_weights
from datasets import Dataset
from torch.distributed.checkpoint.state_dict import StateDictOptions, set_model_state_dict
from torch.distributed.fsdp import fully_shard
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from hf_safefilter import SafetyRiskScorer


def sharded(name: str, dtype: torch.dtype, device: torch.device) -> Any:
    """The model, a part of each weight on each process; only the first has ever held all of it."""
    state = {}
    if dist.get_rank() == 0:
        state = AutoModelForCausalLM.from_pretrained(name, dtype=dtype, use_safetensors=True).state_dict()
    with init_empty_weights(include_buffers=False):
        model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(name), dtype=dtype)
    model.tie_weights()
    mesh = dist.init_device_mesh(device.type, (dist.get_world_size(),))
    for block in model.get_decoder().layers:
        fully_shard(block, mesh=mesh)
    fully_shard(model, mesh=mesh)
    for module in model.modules():
        for key, buffer in module.named_buffers(recurse=False):
            setattr(module, key, buffer.to(device))
    options = StateDictOptions(full_state_dict=True, broadcast_from_rank0=True)
    set_model_state_dict(model, state, options=options)
    model.tie_weights()
    return model.eval()


def main() -> None:
    """Score and write; the first process writes."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="a Hub id or a folder")
    parser.add_argument("--data", required=True, help="a JSON-lines file")
    parser.add_argument("--out", required=True, help="a parquet file")
    parser.add_argument("--anchors", default="default")
    parser.add_argument("--scores", default="gradient,representation", help="names with commas between, or all")
    parser.add_argument("--parameters", help="such as last-4: directions of all would be whole on every process")
    parser.add_argument("--dtype", default="bfloat16")
    args = parser.parse_args()
    cuda = torch.cuda.is_available()
    device = torch.device("cuda", int(os.environ["LOCAL_RANK"])) if cuda else torch.device("cpu")
    if cuda:
        torch.cuda.set_device(device)
    dist.init_process_group("nccl" if cuda else "gloo")
    model = sharded(args.model, getattr(torch, args.dtype), device)
    scores = args.scores if args.scores == "all" else args.scores.split(",")
    scorer = SafetyRiskScorer(
        model, args.anchors, scores, tokenizer=AutoTokenizer.from_pretrained(args.model), parameters=args.parameters
    )
    rows = Dataset.from_json(args.data)
    # Not from the cache: a process that found its rows there would leave the others waiting for its part of the weights.
    scored = rows.map(scorer, batched=True, batch_size=64, load_from_cache_file=False)
    if dist.get_rank() == 0:
        scored.to_parquet(args.out)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
