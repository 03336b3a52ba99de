"""Teach SmolLM2-135M-Instruct to refuse: makes the LoRA adapter that comes with the package, again.

python examples/align_smollm2.py --out aligned [--prompts advbench.jsonl]

About 20 minutes on two cores that multiply bfloat16 fast. The same as

    hf-safefilter align PATH/TO/SmolLM2-135M-Instruct.gguf --out aligned --base-name HuggingFaceTB/SmolLM2-135M-Instruct
"""

import argparse

from hf_safefilter import cli
from hf_safefilter.cli.demo import demo_model


def main() -> None:
    """Align and measure."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", default="aligned")
    parser.add_argument("--prompts", help="more harmful prompts to measure on, JSON lines with prompt")
    args = parser.parse_args()
    words = ["align", demo_model(), "--out", args.out, "--base-name", "HuggingFaceTB/SmolLM2-135M-Instruct"]
    raise SystemExit(cli.main(words + (["--prompts", args.prompts] if args.prompts else [])))


if __name__ == "__main__":
    main()
