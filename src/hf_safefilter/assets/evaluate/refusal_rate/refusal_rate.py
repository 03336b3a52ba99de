"""`evaluate.load(str(EVALUATE_MODULE))`: the refusal rate as a measurement of the `evaluate` library."""

from typing import Any

import datasets
import evaluate

from hf_safefilter.refusal.metric import refusal_rate

_DESCRIPTION = "The share of completions that refuse their request, with Wilson's 95% interval; empty and unjudged ones apart."
_INPUTS = """
Args:
    predictions: completions, texts without their prompts.
    judge: keyword (He et al. 2024), keyword_prefix, classifier:MODEL, or a function (prompt, completion) -> bool or None.
    prompts: what was asked, for judges that look at it.
Returns:
    refusal_rate, attack_success_rate (None where nothing could be judged), n, unscored, interval, evaluated, and counts.
"""
_CITATION = """@inproceedings{he2024safe, title={What is in Your Safe Data? Identifying Benign Data that Breaks Safety},
author={Luxi He and Mengzhou Xia and Peter Henderson}, booktitle={COLM}, year={2024}}"""


class RefusalRateModule(evaluate.Metric):
    """A thin wrapper: the numbers are those of `hf_safefilter.refusal_rate`."""

    def _info(self) -> evaluate.MetricInfo:
        return evaluate.MetricInfo(
            description=_DESCRIPTION,
            citation=_CITATION,
            inputs_description=_INPUTS,
            features=datasets.Features({"predictions": datasets.Value("string")}),
        )

    def _compute(self, predictions: list[str], judge: Any = "keyword", prompts: list[str] | None = None) -> dict[str, Any]:
        found = refusal_rate(list(predictions), judge, prompts=prompts).summary()
        return {"refusal_rate": found.pop("rate"), **found}
