"""The documentation: its Python runs as it stands there, its links lead somewhere, its commands exist, its site builds."""

from __future__ import annotations

import copy
import json
import re
import subprocess
import sys
from pathlib import Path

import datasets
import pytest
from datasets import Dataset
from test_validate import scored_rows
from training import HARMFUL, pad_tokenizer, refusing_model, trainer

from hf_safefilter import AnchorSet, SafetyRiskScorer
from hf_safefilter.cli import build_parser

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")), ROOT / "examples/attack_100/README.md"]
FENCE = re.compile(r"^```(\w+)\n(.*?)^```", re.MULTILINE | re.DOTALL)


def blocks(language: str) -> list:
    found = []
    for page in PAGES:
        for i, (kind, text) in enumerate(FENCE.findall(page.read_text("utf-8"))):
            if kind == language:
                found.append(pytest.param(page, text, id=f"{page.stem}-{i}"))
    return found


@pytest.fixture(scope="module")
def refuses():
    return refusing_model()


@pytest.fixture
def world(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, model, tokenizer, anchors, refuses) -> dict:
    """What the pages' examples take for granted, small: a model of that name, rows of that name, a trainer."""
    monkeypatch.chdir(tmp_path)
    for name in ("HuggingFaceTB/SmolLM2-135M-Instruct", "org/model", "model"):
        model.save_pretrained(name)
        tokenizer.save_pretrained(name)
    load = AnchorSet.load

    def small(source: str = "default", **options) -> AnchorSet:
        return anchors if source in ("default", "user/my-anchors") else load(source, **options)

    monkeypatch.setattr(AnchorSet, "load", small)
    rows = [{"prompt": f"Say {i}.", "completion": f"{i}, as you wish."} for i in range(120)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows[:20]))
    (tmp_path / "prompts.jsonl").write_text("".join(json.dumps({"prompt": p}) + "\n" for p in HARMFUL))
    scored = Dataset.from_list([r | {"risk_gradient_balanced": i / 7} for i, r in enumerate(rows)])
    monkeypatch.setattr(datasets, "load_dataset", lambda name, **_: scored if "scored" in name else Dataset.from_list(rows))
    scorer = SafetyRiskScorer(model, anchors, "gradient", tokenizer=tokenizer)
    monkeypatch.setattr(SafetyRiskScorer, "push_to_hub", lambda self, name: self.save_pretrained(name))
    monkeypatch.setattr(AnchorSet, "push_to_hub", lambda self, name: self.save(name))
    monkeypatch.setattr(SafetyRiskScorer, "from_pretrained", lambda name: scorer)
    in_memory = scored_rows()
    for name in ("risk_gradient_balanced", "risk_representation_balanced"):
        in_memory = in_memory.add_column(name, in_memory["risk_test"][:])
    refusing = copy.deepcopy(refuses)
    made = trainer(refusing, tmp_path / "training")
    return {
        "trainer": made, "SFTTrainer": lambda model, *args, **options: made, "model": refusing, "tokenizer": pad_tokenizer(),
        "args": None, "ds": Dataset.from_list(rows), "scorer": scorer, "anchors": anchors, "scored": in_memory,
        "folder": tmp_path / "study", "SafetyRiskScorer": SafetyRiskScorer,
    }  # fmt: skip


@pytest.mark.parametrize(("page", "text"), blocks("python"))
def test_python_runs(page: Path, text: str, world: dict) -> None:
    if "Subject(" in text:  # a hundred rows of a hundred would take minutes
        small = "learning_rate=5e-3, epochs=2, batch_size=4, micro_batch_size=4, seeds=(0,)"
        text = text.replace("k=100", "k=8").replace("learning_rate=2e-5", small)
        text = text.replace('"prompts.jsonl"', '"prompts.jsonl", benign_prompts=None, held_out=4, judge="keyword_prefix"')
    if "import ray" in text:
        text = text.replace(', reference="ref"', "")
    exec(compile(text, f"{page.name}", "exec"), world)
    if "ray" in world:
        assert "risk_gradient" in world["ray"].data.read_parquet("scored").schema().names
        world["ray"].shutdown()


@pytest.mark.parametrize(("page", "text"), blocks("console"))
def test_commands_exist(page: Path, text: str) -> None:
    """Every `hf-safefilter ...` line is one that the parser takes."""
    lines = re.sub(r"\\\n\s*", " ", text).splitlines()
    for line in lines:
        for command in re.split(r"&&|;|\|", re.sub(r"\s+#.*", "", line).removeprefix("$ ")):
            words = command.split()
            if words[:1] == ["hf-safefilter"]:
                build_parser().parse_args(words[1:])
            elif words[:1] == ["make"] and line.startswith("$"):
                assert re.search(rf"^{words[1]}:", (ROOT / "Makefile").read_text(), re.MULTILINE), line


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.stem)
def test_links_between_files_lead_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\(([^)#\s]+)[^)]*\)", FENCE.sub("", page.read_text("utf-8"))):
        if not target.startswith(("http:", "https:", "javascript:")):
            assert (page.parent / target).exists(), target


def test_the_site_builds(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(tmp_path / "site")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "push_scored_to_hub" in (tmp_path / "site/api/index.html").read_text("utf-8")
