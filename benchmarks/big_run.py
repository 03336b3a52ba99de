"""What a large run would take, on paper: nothing is measured here, every input can be changed.

python benchmarks/big_run.py [--rows 10_000_000 --tokens 150 --gpus 8 --utilisation 0.4]

Operations: 2 x parameters a token for a forward pass; a pass of ours costs so many forwards as it did on SmolLM2-135M
(docs/performance.md, bfloat16 table: its time over that of "forward only"). Memory: weights in bfloat16, shared by the GPUs;
three dense float32 directions over the chosen parameters, which every process holds whole while anchors are fitted.
"""

from __future__ import annotations

import argparse
import json

from transformers import LlamaConfig

# As in docs/performance.md: the pass's share of a training step, over a forward's 0.23.
FORWARDS = {"representation": 0.17 / 0.23, "gradient over the last blocks": 0.54 / 0.23, "all": 0.75 / 0.23}


def parameters(config: LlamaConfig) -> tuple[float, float]:
    """Of a block, and of the head (and of the embedding, as many)."""
    d, inner = config.hidden_size, config.intermediate_size
    kv = d * config.num_key_value_heads // config.num_attention_heads
    return 2 * d * d + 2 * d * kv + 3 * d * inner, d * config.vocab_size


def main() -> None:
    """Print one line of JSON for each pass."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=10_000_000)
    parser.add_argument("--tokens", type=float, default=150, help="of a row")
    parser.add_argument("--gpus", type=int, default=8, help="that share one copy of the model")
    parser.add_argument("--flops", type=float, default=989e12, help="a GPU's bfloat16 operations a second (H100: 989e12)")
    parser.add_argument("--utilisation", type=float, default=0.4)
    parser.add_argument("--last", type=int, default=4, help="blocks for gradients over the last blocks")
    args = parser.parse_args()
    # Llama 3 70B's shape.
    config = LlamaConfig(
        vocab_size=128_256, hidden_size=8192, intermediate_size=28_672, num_hidden_layers=80, num_attention_heads=64,
        num_key_value_heads=8,
    )  # fmt: skip
    block, head = parameters(config)
    whole = config.num_hidden_layers * block + 2 * head
    print(json.dumps({"parameters": whole, "weights_gb_each_gpu": round(2 * whole / args.gpus / 1e9, 1)}))
    for name, forwards in FORWARDS.items():
        over = {"representation": 0, "all": whole}.get(name, args.last * block + head)
        seconds = args.rows * args.tokens * 2 * whole * forwards / (args.flops * args.utilisation)
        line = {"pass": name, "forwards": round(forwards, 2), "gpu_hours_if_all_gpus_work": round(seconds / 3600)}
        # All GPUs of a copy see the same rows (FSDP2), or wait for one another (device_map).
        line["gpu_hours_as_it_is"] = round(seconds / 3600 * args.gpus)
        line["directions_gb_each_process"] = round(3 * 4 * over / 1e9)
        print(json.dumps(line))


if __name__ == "__main__":
    main()
