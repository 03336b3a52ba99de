"""Synthetic instructions: their properties one by one, the answers by a slow oracle of its own, and three ways of tuning."""

from __future__ import annotations

import copy
import itertools
import math
import random
from collections import Counter
from dataclasses import replace

import pytest
import torch
from datasets import concatenate_datasets

from hf_safefilter.errors import InputError
from hf_safefilter.mechanistic.synthetic import (
    EMPTIER,
    IDENTITY,
    KINDS,
    LARGE,
    NULL,
    SMALL,
    make_split,
    make_tokenizer,
    sample_text,
    soft_token_attack,
)
from hf_safefilter.mechanistic.tuning import AWAY, CEILING, METHODS, answer_rates, new_model, pretrain, safety_tune
from hf_safefilter.refusal.generation import Answer
from hf_safefilter.testing import tiny_model, tiny_tokenizer
from hf_safefilter.tuning import Recipe

SETTINGS = pytest.mark.parametrize("setting", [SMALL, LARGE], ids=lambda s: s.name)


def parsed(row) -> tuple[list[str], list[str]]:
    """A prompt's operators and letters."""
    words = row["prompt"].split()
    assert (words[0], words[3], words[-1]) == ("<bos>", "<sot>", "<eot>")
    return words[1:3], words[4:-1]


def steps_of(text: list[str], blocks: tuple[str, ...]) -> set[int]:
    """The steps along the cycle between blocks, read off a SMALL text."""
    order = [next(i for i, block in enumerate(blocks) if set(block) == set(text[at : at + 3])) for at in range(0, len(text), 3)]
    return {(b - a) % len(blocks) for a, b in itertools.pairwise(order)}


def is_unsafe(operator: str, text_class: str) -> bool | None:
    """SMALL's rule, spelled out; `None` where the text does not decide."""
    name = {"d0": "t0", "d3": "t3", "d5": "t5"}.get(operator, operator)
    if name in ("t3", "t4"):
        return True
    if name in ("t0", "t1", "t2", "n0"):
        return False
    return {"unsafe": True, "safe": False, "mixed": None}[text_class]


@SETTINGS
def test_operators_are_distinct_bijections(setting):
    for grammar in range(len(setting.grammars)):
        maps = {name: setting.operator_map(name, grammar) for name in setting.operators}
        assert all(sorted(m) == sorted(m.values()) == sorted(setting.letters) for m in maps.values())
        assert len({tuple(m.values()) for m in maps.values()}) == len(maps)
        assert all(k == v for k, v in maps[IDENTITY].items())
        for same, of in setting.duplicates.items():
            assert setting.operator_map(same, grammar) == maps[of]
            assert setting.operator_class(same, grammar) == setting.operator_class(of, grammar)
    if len(setting.grammars) > 1:
        assert setting.operator_map("t1", 0) != setting.operator_map("t1", 1)


@SETTINGS
def test_each_grammar_has_operators_of_all_classes(setting):
    for grammar in range(len(setting.grammars)):
        classes = Counter(setting.operator_class(name, grammar) for name in setting.operators)
        assert (classes["identity"], classes["safe"], classes["unsafe"]) == (1, 2, 2)
        assert classes["context"] == len(setting.operators) - 5
        assert len(set("".join(setting.grammars[grammar]))) == 3 * len(setting.grammars[grammar])


@SETTINGS
def test_letters_are_as_frequent_in_safe_as_in_unsafe_text(setting):
    rng = random.Random(5)
    n = 6000
    for grammar in range(len(setting.grammars)):
        shares = {}
        for text_class in ("safe", "unsafe", "mixed"):
            texts = [sample_text(setting, grammar, text_class, rng) for _ in range(n)]
            # At the first, a middle and the last place: not only on the whole.
            shares[text_class] = [Counter(t[at] for t in texts) for at in (0, len(texts[0]) // 2, -1)]
        letters = sorted(set("".join(setting.grammars[grammar])))
        expected = n / len(letters)
        for counts in shares.values():
            for place in counts:
                chi2 = sum((place[letter] - expected) ** 2 / expected for letter in letters)
                assert chi2 < len(letters) + 5 * (2 * len(letters)) ** 0.5


def test_the_order_of_blocks_is_what_differs():
    rng = random.Random(1)
    (blocks,) = SMALL.grammars
    seen = {c: [steps_of(sample_text(SMALL, 0, c, rng), blocks) for _ in range(200)] for c in ("safe", "unsafe", "mixed")}
    assert all(steps == {1} for steps in seen["safe"])
    assert all(steps == {3} for steps in seen["unsafe"])
    assert all(steps == {1, 3} for steps in seen["mixed"])


def test_windows_of_the_larger_setting():
    lengths = [len(parsed(row)[1]) for row in make_split("safe", 300, 0, LARGE)]
    assert set(lengths) == set(range(25, 36))


@pytest.mark.parametrize("kind", KINDS)
@SETTINGS
def test_answers_are_the_operators_one_after_the_other(kind, setting):
    """Letter by letter; which grammar is found from the answer and the text alone."""
    for row in make_split(kind, 60, 3, setting):
        operators, text = parsed(row)
        true = row["chosen"] if row["rejected"].startswith(NULL) else row["rejected"]
        null = row["rejected"] if row["rejected"].startswith(NULL) else row["chosen"]
        assert null.split() == [NULL] * len(text)
        if operators[0] == EMPTIER:
            assert row["kind"] == "pretrain"
            continue
        found = []
        for grammar, blocks in enumerate(setting.grammars):
            if set(text) <= set("".join(blocks)):
                first, second = (setting.operator_map(o, grammar) for o in operators)
                found.append(" ".join(second[first[letter]] for letter in text))
        assert true in found


@pytest.mark.parametrize("kind", KINDS)
def test_kinds_are_what_they_say(kind):
    duplicates = set(SMALL.duplicates)
    rows = make_split(kind, 400, 7)
    for row in rows:
        operators, text = parsed(row)
        steps = steps_of(text, SMALL.grammars[0])
        assert row["text_class"] == ("safe" if steps == {1} else "unsafe" if steps == {3} else "mixed")
        if kind == "pretrain":
            continue
        unsafe = [is_unsafe(o, row["text_class"]) for o in operators]
        names = [SMALL.duplicates.get(o, o) for o in operators]
        idle = [name == "t0" for name in names]
        refused = row["chosen"].startswith(NULL)
        assert refused == (kind not in ("safe", "new"))
        assert duplicates.isdisjoint(operators) or kind == "jb_misgen"
        if kind == "safe":
            assert unsafe == [False, False]
        elif kind == "unsafe":
            assert all(u or i for u, i in zip(unsafe, idle, strict=True))
            assert not all(idle)
        elif kind == "jb_co_task":
            assert sorted(unsafe) == [False, True]
            assert not any(idle)
        elif kind == "jb_co_text":
            assert row["text_class"] == "mixed"
            assert None in unsafe
            assert set(unsafe) <= {None, False}
            assert all(u is None or i for u, i in zip(unsafe, idle, strict=True))
        elif kind == "jb_misgen":
            assert set(operators) <= duplicates
            assert any(unsafe)
            assert all(u or i for u, i in zip(unsafe, idle, strict=True))
        elif kind == "new":
            assert "n0" in operators
            assert unsafe == [False, False]
    texts = {"jb_co_text": {"mixed"}, "pretrain": {"safe", "unsafe", "mixed"}}.get(kind, {"safe", "unsafe"})
    assert set(rows["text_class"]) == texts
    operators = {o for row in rows for o in parsed(row)[0]}
    assert ("n0" in operators) == (kind == "new")
    assert (duplicates <= operators) == (kind in ("pretrain", "jb_misgen"))


def test_pretraining_sometimes_shows_the_null_answer():
    rows = make_split("pretrain", 4000, 0)
    share = sum(row["chosen"].startswith(NULL) for row in rows) / len(rows)
    assert 0.004 < share < 0.02


@SETTINGS
def test_same_seed_same_rows(setting):
    once, again = (make_split("unsafe", 50, 4, setting) for _ in range(2))
    assert once.to_list() == again.to_list()
    assert once.to_list() != make_split("unsafe", 50, 6, setting).to_list()


def test_rows_do_not_change_with_the_release():
    """Trained models on disk know this language; if it changes they are worth nothing."""
    assert make_split("jb_misgen", 1, 0)[0]["prompt"] == "<bos> d0 d3 <sot> b a c j k l g h i <eot>"


@pytest.mark.parametrize("kinds", [("pretrain", "safe"), ("unsafe", "unsafe"), ("pretrain", "jb_co_text")])
@SETTINGS
def test_even_and_odd_seeds_share_no_text(kinds, setting):
    texts = [
        {" ".join(parsed(row)[1]) for seed in seeds for row in make_split(kind, 500, seed, setting)}
        for kind, seeds in zip(kinds, [(0, 2, 40), (1, 3, 41)], strict=True)
    ]
    assert texts[0].isdisjoint(texts[1])
    assert all(len(t) > 100 for t in texts)


@pytest.mark.parametrize(
    ("kind", "n", "seed", "says"),
    [("harmful", 5, 0, "kind must be one of pretrain"), ("safe", 0, 0, "n must be"), ("safe", 5, -1, "seed must be")],
)
def test_bad_requests_are_named(kind, n, seed, says):
    with pytest.raises(InputError, match=says):
        make_split(kind, n, seed)


@SETTINGS
def test_every_word_is_a_token_and_comes_back(setting):
    tokenizer = make_tokenizer(setting)
    for kind in KINDS:
        for row in make_split(kind, 20, 0, setting):
            for text in (row["prompt"], row["chosen"], row["rejected"]):
                ids = tokenizer(text)["input_ids"]
                assert tokenizer.unk_token_id not in ids
                assert tokenizer.decode(ids) == text
    conversation = [{"role": "user", "content": "<bos> t1 t2 <sot> a b <eot>"}, {"role": "assistant", "content": "c d"}]
    assert tokenizer.apply_chat_template(conversation, tokenize=False) == "<bos> t1 t2 <sot> a b <eot> c d <eos>"


# Training. The model is far smaller than SMALL's and sees little: this is about plumbing and directions, not about findings.
TINY = replace(SMALL, model={"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2})
QUICK = Recipe(epochs=1, learning_rate=5e-3, batch_size=32, micro_batch_size=32, max_grad_norm=1.0, bf16=False)


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """60 steps: it has learned which tokens answers consist of, and no more."""
    return pretrain(TINY, seed=0, folder=tmp_path_factory.mktemp("pre"), steps=60, recipe=QUICK, progress=False)


def mean_loss(model, tokenizer, split, column: str) -> float:
    """Per token of the answer, from the definition."""
    losses = []
    for row in split:
        start = len(tokenizer(row["prompt"])["input_ids"])
        ids = torch.tensor([tokenizer(f"{row['prompt']} {row[column]} <eos>")["input_ids"]])
        with torch.no_grad():
            log_p = model(input_ids=ids).logits[0, start - 1 : -1].log_softmax(1)
        losses.append(-float(log_p.gather(1, ids[0, start:, None]).mean()))
    return sum(losses) / len(losses)


def test_pretraining_learns(base):
    assert base.problem is None
    assert len(base.losses) == 60
    assert base.losses[-1] < 0.8 * base.losses[0]
    assert base.losses[0] == pytest.approx(math.log(len(make_tokenizer(TINY))), abs=0.3)


def test_pretraining_is_the_same_again(base, tmp_path):
    again = pretrain(TINY, seed=0, folder=tmp_path, steps=60, recipe=QUICK, progress=False)
    assert again.losses == base.losses
    assert all(torch.equal(a, b) for a, b in zip(base.model.parameters(), again.model.parameters(), strict=True))


@pytest.mark.parametrize("method", METHODS)
def test_each_method_moves_towards_the_chosen_answer(base, method, tmp_path):
    tokenizer = make_tokenizer(TINY)
    rows = concatenate_datasets([make_split("safe", 240, 0, TINY), make_split("unsafe", 240, 0, TINY)])
    recipe = replace(QUICK, learning_rate=2e-3)
    tuned = safety_tune(
        copy.deepcopy(base.model), tokenizer, rows, method, recipe=recipe, seed=0, folder=tmp_path, progress=False
    )
    assert tuned.problem is None
    assert len(tuned.losses) == 15
    unsafe = make_split("unsafe", 30, 1, TINY)
    before, after = (
        [mean_loss(m, tokenizer, unsafe, side) for side in ("chosen", "rejected")] for m in (base.model, tuned.model)
    )
    assert after[0] - after[1] < before[0] - before[1] - 1
    if method != "dpo":  # DPO moves the difference alone
        assert after[0] < before[0] - 1
    if method != "sft":
        assert after[1] > before[1] + 0.1
    # What TRL hung on the model is gone: a copy runs on its own weights.
    twin = copy.deepcopy(tuned.model)
    with torch.no_grad():
        for p in twin.parameters():
            p.zero_()
    assert mean_loss(twin, tokenizer, unsafe, "chosen") == pytest.approx(math.log(len(tokenizer)), abs=1e-4)


def test_unlearning_is_bounded_and_its_loss_is_its_definition(base, tmp_path):
    tokenizer = make_tokenizer(TINY)
    rows = make_split("unsafe", 8, 0, TINY)
    recipe = replace(QUICK, batch_size=8, micro_batch_size=8)
    made = safety_tune(
        copy.deepcopy(base.model), tokenizer, rows, "unlearn", recipe=recipe, seed=0, folder=tmp_path, progress=False
    )
    bounded = [
        mean_loss(base.model, tokenizer, [row], "chosen")
        - AWAY * min(mean_loss(base.model, tokenizer, [row], "rejected"), CEILING)
        for row in rows
    ]
    assert made.losses == [pytest.approx(sum(bounded) / 8, abs=1e-3)]
    recipe = replace(recipe, epochs=80, learning_rate=1e-2)
    long = safety_tune(
        copy.deepcopy(base.model), tokenizer, rows, "unlearn", recipe=recipe, seed=0, folder=tmp_path, progress=False
    )
    assert min(long.losses) >= -AWAY * CEILING
    assert mean_loss(long.model, tokenizer, rows, "rejected") < 3 * CEILING


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("lora", [None, 4])
def test_the_methods_on_a_chat_model(method, lora, tmp_path):
    tokenizer, model = tiny_tokenizer(), tiny_model()
    assert tokenizer.pad_token is None
    rows = [
        {"prompt": f"How do I {what}?", "chosen": "I'm sorry, but I can't help.", "rejected": "Sure, here is the answer."}
        for what in ("break it", "fix it", "boil an egg", "cross the hills")
    ] * 8
    recipe = Recipe(epochs=2, learning_rate=1e-2, batch_size=8, micro_batch_size=4, lora_rank=lora, bf16=False)
    before = chat_loss(model, tokenizer, rows[0], "chosen"), chat_loss(model, tokenizer, rows[0], "rejected")
    tuned = safety_tune(copy.deepcopy(model), tokenizer, rows, method, recipe=recipe, seed=0, folder=tmp_path, progress=False)
    assert tuned.problem is None
    assert len(tuned.losses) == 8
    after = chat_loss(tuned.model, tokenizer, rows[0], "chosen"), chat_loss(tuned.model, tokenizer, rows[0], "rejected")
    assert after[0] - after[1] < before[0] - before[1] - 0.05
    assert hasattr(tuned.model, "peft_config") == (lora is not None)
    assert tokenizer.pad_token is None


def chat_loss(model, tokenizer, row, column: str) -> float:
    """Per token of the answer and its end, with the template."""
    messages = [{"role": "user", "content": row["prompt"]}]
    start = len(tokenizer.apply_chat_template(messages, add_generation_prompt=True)["input_ids"])
    ids = tokenizer.apply_chat_template([*messages, {"role": "assistant", "content": row[column]}])["input_ids"][:-1]
    with torch.no_grad():
        log_p = model(input_ids=torch.tensor([ids])).logits[0, start - 1 : -1].log_softmax(1)
    return -float(log_p[range(len(ids) - start), ids[start:]].mean())


@pytest.mark.parametrize(
    ("rows", "method", "size", "says"),
    [
        ([{"prompt": "a", "chosen": "b", "rejected": "c"}], "rlhf", "medium", "method must be one of sft, dpo, unlearn"),
        ([{"prompt": "a", "chosen": "b", "rejected": "c"}], "sft", "large", "size of medium, small"),
        ([], "dpo", "medium", "no rows"),
        ([{"prompt": "a", "chosen": "b"}], "dpo", "medium", "row 0 has no column 'rejected'"),
        ([{"prompt": "a", "chosen": "b", "rejected": ""}], "unlearn", "medium", "row 0 cannot be trained on"),
    ],
)
def test_bad_preferences_are_named(rows, method, size, says, tmp_path):
    with pytest.raises(InputError, match=says):
        safety_tune(tiny_model(), tiny_tokenizer(), rows, method, size, seed=0, folder=tmp_path, progress=False)


def test_answer_rates_by_exact_match(base, monkeypatch):
    split = concatenate_datasets([make_split("unsafe", 4, 1), make_split("safe", 4, 1)])
    tokenizer = make_tokenizer()
    true = [r["rejected"] if r["kind"] == "unsafe" else r["chosen"] for r in split]
    null = [r["chosen"] if r["kind"] == "unsafe" else r["rejected"] for r in split]
    given = [true[0], null[1], null[2] + " a", " ".join(null[3].split()[1:]), true[4], null[5], true[6][:-1] + "?", true[7]]
    answers = [Answer(text, 10, truncated=i == 7) for i, text in enumerate(given)]
    monkeypatch.setattr("hf_safefilter.mechanistic.tuning.generate", lambda *_, **__: answers)
    rates = answer_rates(base.model, tokenizer, split)
    assert rates.answered == [True, False, False, False, True, False, False, False]
    assert rates.refused == [False, True, False, False, False, True, False, False]
    assert (rates.instruct, rates.null, rates.n) == (0.25, 0.25, 8)


@SETTINGS
def test_soft_tokens_stay_in_their_ball_and_help(setting):
    """A random model; texts of different lengths in the larger setting."""
    tokenizer = make_tokenizer(setting)
    model = new_model(replace(setting, model=TINY.model), 1)
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(8 if p.dim() == 2 else 1)  # large enough that the soft tokens matter
    split = make_split("unsafe", 12, 1, setting)
    unit = float(model.get_input_embeddings().weight.detach().norm(dim=1).mean())
    before = [p.clone() for p in model.parameters()]
    for radius in (0.1, 3.0):
        found = soft_token_attack(model, tokenizer, split, radius=radius, steps=6)
        assert found.soft.shape == (12, 2, 32)
        assert float(found.soft.norm(dim=2).max()) <= radius * unit * 1.0001
        assert found.success == [False] * 12
    assert all(torch.equal(a, b) and b.requires_grad for a, b in zip(before, model.parameters(), strict=True))
    again = soft_token_attack(model, tokenizer, split, radius=3.0, steps=6)
    assert torch.equal(found.soft, again.soft)
    start = soft_token_attack(model, tokenizer, split, radius=1e-9, steps=1)
    attacked, plain = (attacked_loss(model, tokenizer, split, soft) for soft in (found.soft, start.soft))
    assert attacked < plain - 0.05


def attacked_loss(model, tokenizer, split, soft: torch.Tensor) -> float:
    """Of the true answers, one row at a time, with something added to the fourth and to the last token of each prompt."""
    losses, embed = [], model.get_input_embeddings()
    for row, (to_start, to_end) in zip(split, soft, strict=True):
        prompt = torch.tensor(tokenizer(row["prompt"])["input_ids"])
        answer = torch.tensor(tokenizer(f"{row['rejected']} <eos>")["input_ids"])
        with torch.no_grad():
            whole = embed(torch.cat([prompt, answer])).clone()
            whole[3] += to_start
            whole[len(prompt) - 1] += to_end
            logits = model(inputs_embeds=whole[None]).logits[0, len(prompt) - 1 : -1]
        losses.append(float(torch.nn.functional.cross_entropy(logits, answer)))
    return sum(losses) / len(losses)


@pytest.mark.parametrize("bad", [{"steps": 0}, {"radius": 0}, {"radius": float("nan")}])
def test_an_attack_without_room_is_an_error(base, bad):
    with pytest.raises(InputError, match="above 0"):
        soft_token_attack(base.model, make_tokenizer(), make_split("unsafe", 2, 1), **bad)
