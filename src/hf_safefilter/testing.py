"""Tiny random models and tokenizers, for our tests and for those of packages built on this one.

They are made in memory in well under a second, with the real classes of transformers, so that code under test cannot tell.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

CHATML_TEMPLATE = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)

_TEXT = [
    "Explain how the weather changes when a warm front meets the cold air over the hills.",
    "1. Wash the rice. 2. Add water. 3. Cook it for ten minutes. - salt - pepper - oil",
    "I'm sorry, but I can't help with that. Sure, here is what you asked for: the answer is 42.",
    "def add(a, b): return a + b  # adds two numbers and returns the sum of both",
]

# Configuration of each kind at a size that runs in milliseconds; tied and untied heads, grouped heads, biases, 1+w norms.
_KINDS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("LlamaConfig", {"num_key_value_heads": 2}),
    "llama_tied": ("LlamaConfig", {"num_key_value_heads": 2, "tie_word_embeddings": True}),
    "qwen2": ("Qwen2Config", {"num_key_value_heads": 2}),
    "qwen3": ("Qwen3Config", {"num_key_value_heads": 2, "head_dim": 8}),
    "gemma": ("GemmaConfig", {"num_key_value_heads": 1, "head_dim": 8}),
    "mistral": ("MistralConfig", {"num_key_value_heads": 2}),
    "phi": ("PhiConfig", {"num_key_value_heads": 4}),
    "gpt2": ("GPT2Config", {}),
}
KINDS = tuple(_KINDS)


@lru_cache
def _bpe(special_tokens: tuple[str, ...]) -> str:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=list(special_tokens),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(_TEXT, trainer)
    return tokenizer.to_str()


def tiny_tokenizer(
    chat_template: str | None = CHATML_TEMPLATE,
    *,
    eos_token: str = "<|im_end|>",
    special_tokens: tuple[str, ...] = ("<|im_start|>",),
    pad_token: str | None = None,
    bos_token: str | None = None,
    padding_side: str = "right",
) -> Any:
    """A fast byte-level BPE tokenizer with about 400 tokens, which encodes any text.

    Args:
        chat_template: a jinja2 chat template, or `None`.
        eos_token, bos_token, pad_token: special tokens.
        special_tokens: further special tokens, such as those of the template.
        padding_side: `"left"` or `"right"`.
    """
    from transformers import PreTrainedTokenizerFast

    named = {"eos_token": eos_token, "bos_token": bos_token, "pad_token": pad_token}
    special = tuple(dict.fromkeys([*(t for t in named.values() if t), *special_tokens]))
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(_bpe(special)),
        extra_special_tokens=list(special_tokens),
        padding_side=padding_side,
        **{name: token for name, token in named.items() if token},
    )
    tokenizer.chat_template = chat_template
    return tokenizer


def tiny_model(kind: str = "llama", *, seed: int = 0, dtype: torch.dtype = torch.float32, **config: Any) -> Any:
    """A random causal language model of one of `KINDS`: two layers, 32 wide, 512 tokens of context, 512 of vocabulary.

    Args:
        kind: the architecture.
        seed: of its weights.
        dtype: of its weights.
        config: overrides of the configuration (`num_hidden_layers=0`, say).
    """
    import transformers

    config_name, extra = _KINDS[kind]
    size = {
        "vocab_size": 512,
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "max_position_embeddings": 512,
        "initializer_range": 0.2,  # large enough that gradients are far from zero
    }
    settings = getattr(transformers, config_name)(**{**size, **extra, **config, "bos_token_id": None, "eos_token_id": 0})
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return transformers.AutoModelForCausalLM.from_config(settings).to(dtype).eval()
