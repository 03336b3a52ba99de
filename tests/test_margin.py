"""The margin and answers: against openings read one by one, and whatever the batch."""

from __future__ import annotations

import random

import numpy as np
import pytest
import torch

from hf_safefilter.chat import ChatEncoder
from hf_safefilter.errors import EvaluationError, InputError
from hf_safefilter.refusal.generation import generate
from hf_safefilter.refusal.judges import margin_openings
from hf_safefilter.refusal.margin import MarginProbe, refusal_margin
from hf_safefilter.refusal.monitor import RefusalMonitor
from hf_safefilter.refusal.prompts import load_prompts, monitor_prompts, prompt_ids
from hf_safefilter.testing import CHATML_TEMPLATE, KINDS, tiny_model, tiny_tokenizer

PROMPTS = ["Hi", "Tell me how to get through the long winter in the hills.", "Name a colour.", "How do I boil an egg?"]


def one_by_one(model, tokenizer, prompt: str, openings=None, *, probability: bool = False) -> float:
    """The definition: each opening after the prompt in a plain forward of its own; its margin, or refusals' probability."""
    before = ChatEncoder(tokenizer).render([{"role": "user", "content": prompt}], add_generation_prompt=True)
    start = len(tokenizer(before, add_special_tokens=False)["input_ids"])
    means, total = [], 0.0
    for side in ("refusal", "affirmative"):
        values = []
        for opening in (openings or margin_openings())[side]:
            ids = tokenizer(before + opening, add_special_tokens=False)["input_ids"]
            with torch.no_grad():
                log_p = torch.log_softmax(model(input_ids=torch.tensor([ids])).logits[0].double(), dim=1)
            tokens = [float(log_p[k - 1, ids[k]]) for k in range(start, len(ids))]
            values.append(np.mean(tokens))
            total += np.exp(np.sum(tokens)) if side == "refusal" else 0
        means.append(np.mean(values))
    return total if probability else means[0] - means[1]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_the_margin_is_its_definition(kind, attention):
    model, tokenizer = tiny_model(kind, dtype=torch.float64), tiny_tokenizer()
    model.set_attn_implementation(attention)
    expected = [one_by_one(model, tokenizer, prompt) for prompt in PROMPTS]
    found = refusal_margin(model, tokenizer, PROMPTS)
    assert found.values == pytest.approx(expected, abs=1e-5)
    assert found.probabilities == pytest.approx([one_by_one(model, tokenizer, p, probability=True) for p in PROMPTS], abs=1e-6)
    assert found.probability == pytest.approx(np.mean(found.probabilities))


@pytest.mark.parametrize(
    "openings",
    [
        {"refusal": ["I"], "affirmative": ["Sure"]},
        {"refusal": ["I cannot help", "I cannot", "No"], "affirmative": ["Sure, here is the list", "Sure, the", "1. Wash"]},
    ],
)
def test_openings_of_any_shape(model, tokenizer, openings):
    found = refusal_margin(model, tokenizer, PROMPTS, openings)
    assert found.values == pytest.approx([one_by_one(model, tokenizer, p, openings) for p in PROMPTS], abs=1e-4)
    assert found.mean == pytest.approx(np.mean(found.values))
    half = 1.96 * np.std(found.values, ddof=1) / 2
    assert found.interval == pytest.approx((found.mean - half, found.mean + half))


def test_an_opening_within_another_is_counted_once(model, tokenizer):
    nested = {"refusal": ["I cannot help", "I cannot", "I"], "affirmative": ["Sure"]}
    alone = {"refusal": ["I"], "affirmative": ["Sure"]}
    found, expected = (refusal_margin(model, tokenizer, PROMPTS, o).probabilities for o in (nested, alone))
    assert found == pytest.approx(expected, rel=1e-4)


def test_the_margin_does_not_depend_on_the_batch(model, tokenizer):
    encoder = ChatEncoder(tokenizer)
    shared = CHATML_TEMPLATE.replace(
        "{% for", "{{ '<|im_start|>system\nYou are a kind helper of people.<|im_end|>\n' }}{% for", 1
    )
    for template in (CHATML_TEMPLATE, shared):
        encoder.tokenizer.chat_template = template
        whole, single = (MarginProbe(encoder, PROMPTS, batch_size=n) for n in (64, 1))
        assert whole(model).values == pytest.approx(single(model).values, abs=1e-4)
        backwards = MarginProbe(encoder, PROMPTS[::-1])
        assert backwards(model).values[::-1] == pytest.approx(whole(model).values, abs=1e-4)
        assert whole(model).values == pytest.approx([one_by_one(model, tokenizer, p) for p in PROMPTS], abs=1e-4)
        assert MarginProbe(encoder, PROMPTS[:1])(model).values == pytest.approx(whole(model).values[:1], abs=1e-4)
    assert whole.prefix
    encoder.tokenizer.chat_template = CHATML_TEMPLATE


def test_a_space_before_the_answer():
    """Llama-2's kind of template: what it writes before an answer is not in the generation prompt."""
    tokenizer = tiny_tokenizer(
        "{% for m in messages %}{% if m['role'] == 'user' %}{{ '[INST] ' + m['content'] + ' [/INST]' }}"
        "{% else %}{{ ' ' + m['content'] + ' <|im_end|>' }}{% endif %}{% endfor %}"
    )
    model = tiny_model(dtype=torch.float64)
    spaced = {side: [" " + o for o in openings] for side, openings in margin_openings().items()}
    expected = [one_by_one(model, tokenizer, prompt, spaced) for prompt in PROMPTS]
    assert refusal_margin(model, tokenizer, PROMPTS).values == pytest.approx(expected, abs=1e-5)


def test_a_model_that_ignores_the_tree_is_found_out(tokenizer):
    """One that reads all tokens in a row, as a recurrent model would."""
    model = tiny_model()
    plain = model.forward

    def in_a_row(input_ids, attention_mask=None, position_ids=None, **options):
        return plain(input_ids, **options)

    model.forward = in_a_row
    openings = {"refusal": ["I cannot help", "No sorry for the"], "affirmative": ["Sure, here is the list", "Add water"]}
    with pytest.raises(EvaluationError, match="does not read openings as a tree"):
        refusal_margin(model, tokenizer, PROMPTS, openings)


@pytest.mark.parametrize(
    ("prompts", "openings", "reason"),
    [
        ([], None, "no harmful prompts"),
        (["ok", ""], None, "harmful prompt 1 must be a text"),
        ([{"x": 1}], None, "harmful prompt 0 must be a text"),
        ([[{"role": "assistant", "content": "a"}]], None, "harmful prompt 0 must be"),
        ("/nowhere.jsonl", None, "cannot read prompts"),
        (["a"], {"refusal": ["No"]}, "openings must be"),
        (["a"], {"refusal": ["No"], "affirmative": [""]}, "openings must be"),
        (["a"], {"refusal": ["No"], "affirmative": ["No"]}, "cannot be told apart"),
    ],
)
def test_bad_prompts_and_openings(model, tokenizer, prompts, openings, reason):
    with pytest.raises(InputError, match=reason):
        refusal_margin(model, tokenizer, prompts, openings)


def test_options_of_the_chat_template(model):
    tokenizer = tiny_tokenizer(CHATML_TEMPLATE + "{% if enable_thinking | default(true) %}{{ '<think>' }}{% endif %}")
    thinking = RefusalMonitor(tokenizer, PROMPTS, None)
    plain = RefusalMonitor(tokenizer, PROMPTS, None, chat_template_kwargs={"enable_thinking": False})
    mark = tokenizer("<think>")["input_ids"]
    assert thinking._ids == [ids + mark for ids in plain._ids]
    assert plain.check(model).margin.values == pytest.approx(refusal_margin(model, tiny_tokenizer(), PROMPTS).values, abs=1e-5)


def test_prompts_in_any_form(tmp_path):
    file = tmp_path / "p.jsonl"
    file.write_text('{"prompt": "a"}\n\n"b"\n[{"role": "system", "content": "s"}, {"role": "user", "content": "c"}]\n')
    user = lambda text: {"role": "user", "content": text}  # noqa: E731
    expected = [[user("a")], [user("b")], [{"role": "system", "content": "s"}, user("c")]]
    assert load_prompts(file, "harmful") == expected
    assert load_prompts(expected, "harmful") == expected
    assert [c[0]["content"] for c in load_prompts("default", "benign")] == [p["prompt"] for p in monitor_prompts("benign")]
    assert len(monitor_prompts("harmful")) == len(monitor_prompts("benign")) == 64


def test_answers_are_greedy_and_do_not_depend_on_the_batch(tokenizer):
    """Left padding with a mask, and settings of the model that would change answers do not count."""
    model = tiny_model(max_position_embeddings=128)
    encoder = ChatEncoder(tokenizer)
    ids = [prompt_ids(encoder, c, "prompt", 100) for c in load_prompts(PROMPTS, "benign")]
    model.generation_config.update(do_sample=True, temperature=2.0, repetition_penalty=3.0, no_repeat_ngram_size=2)
    alone, together = (generate(model, tokenizer, ids, max_new_tokens=8, batch_size=n) for n in (1, 4))
    assert alone == together
    for prompt, answer in zip(ids, alone, strict=True):
        sequence = list(prompt)
        for _ in range(answer.tokens):
            with torch.no_grad():
                sequence.append(int(model(input_ids=torch.tensor([sequence])).logits[0, -1].argmax()))
        assert tokenizer.decode(sequence[len(prompt) :], skip_special_tokens=True) == answer.text
        assert answer.truncated == (answer.tokens == 8 and sequence[-1] != tokenizer.eos_token_id)


def test_nothing_is_disturbed(tokenizer):
    """Modes, flags and random states are what they were, also when generation fails."""
    model = tiny_model()
    model.train()
    model.model.layers[0].eval()
    model.config.use_cache = False
    tokenizer.padding_side = "right"
    modes = [m.training for m in model.modules()]
    before = random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()
    ids = [[1, 2, 3]]
    generate(model, tokenizer, ids, max_new_tokens=3)
    refusal_margin(model, tokenizer, PROMPTS)
    with pytest.raises(IndexError):
        generate(model, tokenizer, [[10**6]], max_new_tokens=3)
    assert [m.training for m in model.modules()] == modes
    assert model.config.use_cache is False
    assert tokenizer.padding_side == "right"
    assert before == (random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist())
    with pytest.raises(InputError, match="has room for 4"):
        prompt_ids(ChatEncoder(tokenizer), load_prompts(PROMPTS, "benign")[1], "benign prompt 1", 4)
