"""Fixtures: no network, caches in a temporary folder, tiny models."""

from __future__ import annotations

import copy
import os
import tempfile
from pathlib import Path

import pytest

# Before any Hugging Face library is imported.
_CACHE = tempfile.TemporaryDirectory(prefix="hf_safefilter_tests_")
os.environ.update(HF_HOME=_CACHE.name, HF_HUB_OFFLINE="1", HF_HUB_DISABLE_TELEMETRY="1", TOKENIZERS_PARALLELISM="false")

import datasets
import torch

from hf_safefilter import AnchorSet
from hf_safefilter.testing import tiny_model, tiny_tokenizer

datasets.disable_progress_bars()
torch.manual_seed(0)


@pytest.fixture(scope="session")
def tokenizer():
    return tiny_tokenizer()


@pytest.fixture(scope="session")
def model():
    return tiny_model()


@pytest.fixture(scope="session")
def anchors() -> AnchorSet:
    """Four requests of the built-in set: fitting the whole set would be most of a test's time."""
    return AnchorSet.load().subset(["fraud"])


@pytest.fixture
def model_folder(tmp_path: Path, model, tokenizer) -> Path:
    folder = tmp_path / "model"
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


ROWS = [
    {"prompt": "List three fruits.", "completion": "1. Apple\n2. Pear\n3. Plum"},
    {"prompt": "What is 6 times 7?", "completion": "42"},
    {"prompt": "Say hello.", "completion": "Hello there, how are you doing on this fine day?"},
    {"prompt": "Explain rain.", "completion": "Warm air rises, cools down over the hills, and its water falls as rain. " * 3},
    {"prompt": "Name a colour.", "completion": "Blue"},
    {"prompt": "How do I bake bread?", "completion": "- flour\n- water\n- salt\nMix it, wait a day, and bake it."},
    {"prompt": "Translate 'cat' to German.", "completion": "Katze"},
]


@pytest.fixture
def rows() -> list[dict[str, str]]:
    return [dict(r) for r in ROWS]


@pytest.fixture(scope="module")
def taught():
    """Refuses harmful requests; with dropout, so that training draws random numbers."""
    from training import refusing_model  # transformers' Trainer, which most tests do without

    return refusing_model(attention_dropout=0.1)


@pytest.fixture
def refusing(taught):
    """A copy to train."""
    return copy.deepcopy(taught)
