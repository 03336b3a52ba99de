"""Rendering, target spans and truncation."""

from __future__ import annotations

from pathlib import Path

import pytest

from hf_safefilter.chat import IGNORE, ChatEncoder
from hf_safefilter.errors import InputError, UnscorableRow
from hf_safefilter.formats import Conversation
from hf_safefilter.testing import tiny_tokenizer

TEMPLATES = {
    "chatml": {"eos_token": "<|im_end|>", "special_tokens": ("<|im_start|>",)},
    "llama3": {
        "eos_token": "<|eot_id|>",
        "bos_token": "<|begin_of_text|>",
        "special_tokens": ("<|start_header_id|>", "<|end_header_id|>"),
    },
    "qwen3": {"eos_token": "<|im_end|>", "special_tokens": ("<|im_start|>",)},
    "gemma": {"eos_token": "<end_of_turn>", "bos_token": "<bos>", "special_tokens": ("<start_of_turn>",)},
    "mistral": {"eos_token": "</s>", "bos_token": "<s>", "special_tokens": ("[INST]", "[/INST]")},
}
# What the template writes between the generation prompt and the content of a last turn.
OPENS = {"qwen3": "<think>\n\n</think>\n\n", "mistral": " "}
SYSTEM = {"role": "system", "content": "Be brief."}
TURNS = (
    {"role": "user", "content": "Hi, who are you?"},
    {"role": "assistant", "content": "I am a test, a test."},
    {"role": "user", "content": "a test?"},
    {"role": "assistant", "content": "Yes, a test."},
)


def encoder_for(name: str, **options) -> ChatEncoder:
    template = (Path(__file__).parent / "templates" / f"{name}.jinja").read_text()
    return ChatEncoder(tiny_tokenizer(template, **TEMPLATES[name]), **options)


def target_text(encoder: ChatEncoder, *args, **kwargs) -> str:
    example = encoder.encode(*args, **kwargs)
    return encoder.tokenizer.decode([label for label in example.labels if label != IGNORE])


@pytest.mark.parametrize("name", TEMPLATES)
@pytest.mark.parametrize("with_system", [False, True])
def test_targets_of_each_template(name, with_system):
    encoder, eos = encoder_for(name), TEMPLATES[name]["eos_token"]
    if with_system and name == "gemma":
        with pytest.raises(UnscorableRow, match="template rejects the row: System role not supported"):
            encoder.encode(Conversation((SYSTEM, *TURNS)))
        return
    talk = Conversation((SYSTEM, *TURNS) if with_system else TURNS)
    last = OPENS.get(name, "") + "Yes, a test." + eos
    # Qwen3's thinking block stands in the last turn only. Mistral's system text moves with the last user turn, so there the
    # first response is found by its content, and the token that holds its first letter holds the template's space too.
    first = ("" if name == "qwen3" else OPENS.get(name, "")) + "I am a test, a test." + eos
    assert target_text(encoder, talk, "last_assistant") == last
    assert target_text(encoder, talk, "assistant") == first + last
    full = encoder.render(talk.messages)
    # The very first token is predicted from nothing and cannot be a target.
    first_token = encoder.tokenizer.decode(encoder.tokenizer(full, add_special_tokens=False)["input_ids"][:1])
    assert first_token + target_text(encoder, talk, "all") == full


@pytest.mark.parametrize("name", TEMPLATES)
def test_single_turn_target_is_the_response_and_its_end(name):
    encoder = encoder_for(name)
    talk = Conversation(TURNS[:2], prompt_messages=1)
    expected = OPENS.get(name, "") + "I am a test, a test." + TEMPLATES[name]["eos_token"]
    for target in ("assistant", "last_assistant"):
        assert target_text(encoder, talk, target) == expected
    # The completion also holds what the template writes after the turn, as a trainer sees it.
    assert target_text(encoder, talk, "completion").rstrip() == expected


def test_completion_is_all_that_follows_the_prompt():
    encoder = encoder_for("chatml")
    assert target_text(encoder, Conversation(TURNS, prompt_messages=2), "completion") == (
        "<|im_start|>user\na test?<|im_end|>\n<|im_start|>assistant\nYes, a test.<|im_end|>\n"
    )
    assert target_text(encoder, Conversation(TURNS), "completion") == "Yes, a test.<|im_end|>"


def test_completion_labels_are_those_that_trl_trains_on(tmp_path):
    """TRL's SFTTrainer prepares the same rows; its labels and ours must mark the same tokens."""
    from datasets import Dataset
    from trl import SFTConfig, SFTTrainer

    from hf_safefilter.testing import tiny_model

    rows = [
        {"prompt": [TURNS[0]], "completion": [TURNS[1]]},
        {"prompt": [SYSTEM, TURNS[0]], "completion": [TURNS[1], TURNS[2], TURNS[3]]},
        {"prompt": list(TURNS[:3]), "completion": [TURNS[3]]},
    ]
    encoder = encoder_for("chatml")
    tokenizer = encoder.tokenizer
    tokenizer.pad_token = "<|im_end|>"
    config = SFTConfig(str(tmp_path), max_length=None, report_to="none", use_cpu=True, bf16=False)
    trainer = SFTTrainer(tiny_model(), config, train_dataset=Dataset.from_list(rows), processing_class=tokenizer)
    for row, trained in zip(rows, trainer.train_dataset, strict=True):
        prompt = len(row["prompt"])
        ours = encoder.encode(Conversation((*row["prompt"], *row["completion"]), prompt), "completion")
        assert ours.input_ids == trained["input_ids"]
        assert ours.labels == trained["labels"]


def test_thinking_of_an_earlier_turn_is_not_lost_silently():
    """Qwen3's template drops an earlier turn's thinking: what it renders in its place is the target."""
    encoder = encoder_for("qwen3")
    thought = {"role": "assistant", "content": "<think>\nHm.\n</think>\n\nI am a test."}
    talk = Conversation((TURNS[0], thought, *TURNS[2:]))
    assert target_text(encoder, talk, "assistant") == ("I am a test.<|im_end|><think>\n\n</think>\n\nYes, a test.<|im_end|>")


def test_a_template_that_hides_content_gives_a_reason():
    encoder = ChatEncoder(tiny_tokenizer("{% for m in messages %}{{ m['content'] | upper | replace('E', '') }}{% endfor %}"))
    talk = Conversation(({"role": "user", "content": "\ue000"}, {"role": "assistant", "content": "hello"}, *TURNS[2:]))
    assert target_text(encoder, talk, "assistant")  # prefixes still work
    shuffled = ChatEncoder(tiny_tokenizer("{% for m in messages[::-1] %}{{ m['content'] * 2 }}{% endfor %}"))
    with pytest.raises(UnscorableRow, match="rewrites message 1"):
        shuffled.encode(talk)


def test_fallback_template_is_used_and_named(caplog):
    encoder = ChatEncoder(tiny_tokenizer(None))
    assert encoder.template_name == "hf_safefilter-fallback"
    assert "hf_safefilter-fallback" in caplog.text
    assert (
        encoder.render(TURNS[:2]) == "### Instruction:\nHi, who are you?\n\n### Response:\nI am a test, a test.<|im_end|>\n\n"
    )
    assert target_text(encoder, Conversation(TURNS)) == "I am a test, a test.<|im_end|>Yes, a test.<|im_end|>"
    assert encoder.render((SYSTEM, {"role": "tool", "content": "7"})) == "Be brief.\n\n### tool:\n7\n\n"


def test_text_is_trained_on_whole_and_ends():
    encoder = encoder_for("chatml")
    example = encoder.encode(Conversation(text="Once upon a time"))
    assert encoder.tokenizer.decode(example.input_ids) == "Once upon a time<|im_end|>"
    assert example.labels == [IGNORE, *example.input_ids[1:]]


def test_truncation_keeps_the_start_and_says_so():
    whole = encoder_for("chatml").encode(Conversation(TURNS[:2]))
    length = len(whole.input_ids)
    cut = encoder_for("chatml", max_length=length - 4).encode(Conversation(TURNS[:2]))
    assert cut.input_ids == whole.input_ids[: length - 4]
    assert cut.labels == whole.labels[: length - 4]
    # The last token is the newline after the turn, which is no target: three of the four cut tokens were targets.
    wanted = len(whole.target_positions)
    assert cut.status == f"truncated: kept {wanted - 3} of {wanted} target tokens (max_length={length - 4})"
    assert encoder_for("chatml", max_length=length - 1).encode(Conversation(TURNS[:2])).status == "ok"
    prompt = whole.target_positions[0]
    with pytest.raises(UnscorableRow, match=f"no target token left: truncation at max_length={prompt} cut all {wanted}"):
        encoder_for("chatml", max_length=prompt).encode(Conversation(TURNS[:2]))


def test_hundred_thousand_tokens():
    encoder = encoder_for("chatml", max_length=64)
    long = Conversation((TURNS[0], {"role": "assistant", "content": "word " * 100_000}))
    example = encoder.encode(long)
    assert len(example.input_ids) == 64
    assert example.status.startswith("truncated: kept ")


def test_rows_beyond_the_limits_are_not_read():
    encoder = ChatEncoder(tiny_tokenizer())
    with pytest.raises(UnscorableRow, match="too long: 1,000,005 characters, and at most 1,000,000 are read"):
        encoder.encode(Conversation(text="a" * 1_000_005))
    with pytest.raises(UnscorableRow, match="too long"):
        encoder.encode(
            Conversation(({"role": "user", "content": "a" * 600_000}, {"role": "assistant", "content": "b" * 600_000}))
        )
    many = tuple({"role": role, "content": "x"} for _ in range(501) for role in ("user", "assistant"))
    with pytest.raises(UnscorableRow, match="too many messages: 1,002, and at most 1,000 are read"):
        encoder.encode(Conversation(many))


def test_control_tokens_in_content_are_encoded_as_a_trainer_would_and_reported():
    encoder = encoder_for("chatml")
    sly = {"role": "assistant", "content": "ok<|im_end|>\n<|im_start|>user\nmore"}
    example = encoder.encode(Conversation((TURNS[0], sly)))
    assert example.status == "content holds control tokens: <|im_end|> <|im_start|>"
    assert target_text(encoder, Conversation((TURNS[0], sly))) == sly["content"] + "<|im_end|>"


@pytest.mark.parametrize(
    ("messages", "target", "reason"),
    [
        (TURNS[:1], "assistant", "no assistant turn"),
        ((TURNS[0], {"role": "assistant", "content": ""}), "assistant", "the response is empty"),
        ((TURNS[0], {"role": "assistant", "content": ""}), "completion", "the completion is empty"),
    ],
)
def test_rows_without_target(messages, target, reason):
    with pytest.raises(UnscorableRow, match=reason):
        encoder_for("chatml").encode(Conversation(messages, prompt_messages=1), target)


def test_a_single_token_has_nothing_to_predict():
    encoder = ChatEncoder(tiny_tokenizer(eos_token=None, special_tokens=()))
    with pytest.raises(UnscorableRow, match="nothing for the model to predict"):
        encoder.encode(Conversation(text="a"))


def test_roles_in_an_order_that_the_template_forbids():
    with pytest.raises(UnscorableRow, match="roles must alternate"):
        encoder_for("gemma").encode(Conversation((TURNS[1], TURNS[0])))
    # ChatML takes any order.
    assert target_text(encoder_for("chatml"), Conversation((TURNS[1], TURNS[0]))) == "I am a test, a test.<|im_end|>"


def test_first_targets_cuts_after_the_last_of_them():
    example = encoder_for("chatml").encode(Conversation(TURNS[:2]))
    first = example.first_targets(3)
    assert first.target_positions == example.target_positions[:3]
    assert len(first.input_ids) == first.target_positions[-1] + 1
    assert example.first_targets(10_000).target_positions == example.target_positions


def test_tool_calls_are_targets():
    template = (
        "{% if tools %}{{ tools[0]['name'] }}{% endif %}{% for m in messages %}<{{ m['role'] }}>"
        "{{ m['content'] or m['tool_calls'][0]['name'] }}{% endfor %}{% if add_generation_prompt %}<assistant>{% endif %}"
    )
    encoder = ChatEncoder(tiny_tokenizer(template))
    call = {"role": "assistant", "content": None, "tool_calls": [{"name": "get_time"}]}
    talk = Conversation((TURNS[0], call), tools=[{"name": "clock"}])
    assert encoder.render(talk.messages, tools=talk.tools).startswith("clock<user>")
    assert target_text(encoder, talk) == "get_time"


def test_bad_options():
    with pytest.raises(InputError, match="target must be one of"):
        ChatEncoder(tiny_tokenizer(), target="user")
    with pytest.raises(InputError, match="max_length must be"):
        ChatEncoder(tiny_tokenizer(), max_length=1)
    with pytest.raises(InputError, match="gives no character offsets"):
        ChatEncoder(object())
