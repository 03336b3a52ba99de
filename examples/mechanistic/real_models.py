"""What a LoRA adapter that teaches refusing changed inside a chat model: held-out clusters, block by block.

python examples/mechanistic/real_models.py [--model MODEL --adapter ADAPTER]

By default SmolLM2-135M-Instruct and the adapter of this package. `hf-safefilter mechanism --base ... --tuned ...` does this and
all other analyses, with controls, tables and pictures.
"""

from __future__ import annotations

import argparse

from hf_safefilter.chat import ChatEncoder
from hf_safefilter.cli.demo import demo_adapter, demo_model
from hf_safefilter.engine.loading import load, named_spec
from hf_safefilter.mechanistic.analyses import cluster_separation, direction_drift, mlp_inputs
from hf_safefilter.refusal.prompts import load_prompts, prompt_ids


def main() -> None:
    """Look at both models."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="a Hub id, a folder or a .gguf file")
    parser.add_argument("--adapter", help="a PEFT adapter of it")
    args = parser.parse_args()
    model, adapter = args.model or str(demo_model()), args.adapter or (None if args.model else str(demo_adapter()))
    seen, separations = [], []
    for with_adapter in (None, adapter):
        loaded, tokenizer = load(named_spec(model, adapter=with_adapter, dtype="float32"), "cpu")
        encoder = ChatEncoder(tokenizer)
        prompts = {
            side: [prompt_ids(encoder, c, f"{side} prompt {i}", 2048) for i, c in enumerate(load_prompts("default", side))]
            for side in ("benign", "harmful")
        }
        activations = tuple(mlp_inputs(loaded, prompts[side]) for side in ("benign", "harmful"))
        seen.append(activations)
        separations.append(cluster_separation(*activations))
    print(f"{'block':>5}{'AUROC before':>14}{'after':>7}{'cosine of the refusal directions':>34}")
    for before, after, drift in zip(*separations, direction_drift(*seen), strict=True):
        print(f"{before['layer']:>5}{before['auroc']:>14.2f}{after['auroc']:>7.2f}{drift['cosine']:>34.2f}")


if __name__ == "__main__":
    main()
