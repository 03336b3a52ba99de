"""Where the limits of "incoherent" stand: real greedy answers, and gibberish made of them.

hf-safefilter monitor MODEL --out check && python benchmarks/coherence.py MODEL check/answers.jsonl

Perplexity under MODEL, and the share flagged with and without it, of the answers as they are, their words in random order,
random tokens of the same number, and one word repeated (seed 0).
"""

from __future__ import annotations

import argparse
import json
import random
from pathlib import Path

import numpy as np

from hf_safefilter.cli.show import table
from hf_safefilter.engine.loading import load, named_spec
from hf_safefilter.refusal.coherence import is_incoherent, perplexities


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("answers", type=Path)
    args = parser.parse_args()
    records = [json.loads(line) for line in args.answers.read_text("utf-8").splitlines()]
    records = [r for r in records if r["completion"].strip()]
    model, tokenizer = load(named_spec(args.model), "cpu")
    generator = random.Random(0)
    answers = [r["completion"] for r in records]
    shuffled = [" ".join(generator.sample(words := a.split(), len(words))) for a in answers]
    noise = [tokenizer.decode([generator.randrange(1000, 40_000) for _ in range(r["tokens"])]) for r in records]
    repeated = [" ".join([a.split()[0]] * len(a.split())) for a in answers]
    prompts = [[{"role": "user", "content": r["prompt"]}] for r in records]
    lines = []
    for name, texts in (
        ("answers", answers),
        ("words shuffled", shuffled),
        ("random tokens", noise),
        ("one word repeated", repeated),
    ):
        found = perplexities(model, tokenizer, prompts, texts)
        low, median, high = np.percentile([p for p in found if p is not None], [5, 50, 95])
        alone = np.mean([is_incoherent(t) for t in texts])
        both = np.mean([is_incoherent(t, p) for t, p in zip(texts, found, strict=True)])
        spread = f"{median:.1f} ({low:.1f} to {high:.1f})"
        lines.append(
            {
                "": name,
                "n": len(texts),
                "perplexity (5% to 95%)": spread,
                "flagged": f"{both:.0%}",
                "without perplexity": f"{alone:.0%}",
            }
        )
    print(table(lines, list(lines[0])))


if __name__ == "__main__":
    main()
