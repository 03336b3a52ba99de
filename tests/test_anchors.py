"""Anchor sets and the built-in assets."""

from __future__ import annotations

import json
from collections import Counter
from importlib import resources

import pytest
from datasets import Dataset

from hf_safefilter import AnchorSet
from hf_safefilter.errors import InputError
from hf_safefilter.refusal.prompts import monitor_prompts

HARMFUL = [{"prompt": "p", "completion": "Sure:"}]
SAFE = [{"prompt": "p", "completion": "No."}]


def test_the_built_in_set():
    anchors = AnchorSet.load("default")
    assert len(anchors.harmful) == 32
    assert Counter(d["category"] for d in anchors.harmful).most_common()[-1][1] == 4
    assert len(anchors.categories) == 8
    assert len(anchors.safe) == 2
    for side in anchors.safe:
        assert [d["prompt"] for d in side] == [d["prompt"] for d in anchors.harmful]
    for demonstrations in zip(*anchors.sides.values(), strict=True):
        words = [len(d["completion"].split()) for d in demonstrations]
        assert max(words) <= 12, demonstrations
        assert max(words) - min(words) <= 4, demonstrations
        assert len({d["completion"] for d in demonstrations}) == 3


def test_the_monitor_prompts_are_pairs_and_none_is_an_anchor():
    harmful, benign = monitor_prompts("harmful"), monitor_prompts("benign")
    assert len(harmful) == len(benign) == 64
    assert [p["category"] for p in harmful] == [p["category"] for p in benign]
    texts = [p["prompt"] for p in (*harmful, *benign, *AnchorSet.load().harmful)]
    assert len(set(texts)) == len(texts)
    assert "How do I kill a Python process that hangs?" in texts


def test_the_benign_sample_is_a_mix_of_kinds():
    text = resources.files("hf_safefilter").joinpath("assets/benign_sample.jsonl").read_text("utf-8")
    rows = [json.loads(line) for line in text.splitlines()]
    assert len(rows) == 240
    assert len({r["prompt"] for r in rows}) == 240
    assert all(r["prompt"].strip() and r["completion"].strip() for r in rows)
    assert set(Counter(r["kind"] for r in rows).values()) == {30}
    assert len({r["kind"] for r in rows}) == 8


def test_save_and_load(tmp_path):
    anchors = AnchorSet.load()
    file = anchors.save(tmp_path / "mine.json")
    assert AnchorSet.load(file) == anchors
    assert anchors.save(tmp_path / "folder").name == "anchors.json"
    loaded = AnchorSet.load(tmp_path / "folder")
    assert loaded == anchors
    assert loaded.content_hash == anchors.content_hash
    assert not list(tmp_path.rglob("*.tmp"))


def test_the_hash_is_of_what_scores_depend_on():
    anchors = AnchorSet(HARMFUL, [SAFE])
    assert AnchorSet([{**HARMFUL[0], "category": "c"}], [SAFE], name="n").content_hash == anchors.content_hash
    assert AnchorSet(HARMFUL, [[{"prompt": "p", "completion": "No!"}]]).content_hash != anchors.content_hash
    assert AnchorSet(HARMFUL, [SAFE, SAFE]).content_hash != anchors.content_hash


def test_subset():
    anchors = AnchorSet.load().subset(["fraud", "drugs"])
    assert {len(side) for side in anchors.sides.values()} == {8}
    assert anchors.categories == ["drugs", "fraud"]
    assert "default[fraud,drugs]: 8 harmful, 8 + 8 safe" in repr(anchors)
    assert AnchorSet.load().subset("hate").categories == ["hate"]
    everything = AnchorSet.load()
    with pytest.raises(InputError, match="no category 'cats' among the anchors; there are cybercrime"):
        everything.subset(["cats"])


def test_from_dataset():
    ds = Dataset.from_dict({"q": ["a", "b"], "yes": ["Sure", "Okay"], "no": ["No", "Never"], "not": ["Nope", "Sorry"]})
    anchors = AnchorSet.from_dataset(ds, prompt="q", harmful="yes", safe=["no", "not"], name="mine")
    assert anchors.harmful == [{"prompt": "a", "completion": "Sure"}, {"prompt": "b", "completion": "Okay"}]
    assert [d["completion"] for d in anchors.safe[1]] == ["Nope", "Sorry"]
    assert AnchorSet.from_dataset(ds, prompt="q", harmful="yes", safe="no", category="not").categories == ["Nope", "Sorry"]
    with pytest.raises(InputError, match="no column 'x'; it has q, yes, no, not"):
        AnchorSet.from_dataset(ds, prompt="x")


@pytest.mark.parametrize(
    ("harmful", "safe", "reason"),
    [
        ([], [SAFE], "side harmful is empty"),
        (HARMFUL, [], "no safe side"),
        (HARMFUL, [[]], r"side safe\[0\] is empty"),
        (HARMFUL, SAFE, r"wrap your one set: safe=\[\[...\]\]"),
        ("text", [SAFE], "side harmful is empty"),
        ([{"prompt": "p"}], [SAFE], r"harmful\[0\] has no completion"),
        ([{"prompt": " ", "completion": "c"}], [SAFE], r"harmful\[0\] has no prompt"),
        ([["p", "c"]], [SAFE], r"harmful\[0\] must be a dict"),
        ([{**HARMFUL[0], "answer": "x"}], [SAFE], r"harmful\[0\] has the unknown key 'answer'"),
    ],
)
def test_bad_sets(harmful, safe, reason):
    with pytest.raises(InputError, match=reason):
        AnchorSet(harmful, safe)


def test_bad_files(tmp_path):
    (tmp_path / "broken.json").write_text("{")
    (tmp_path / "other.json").write_text("[]")
    (tmp_path / "newer.json").write_text('{"format": "hf_safefilter.anchors/9", "harmful": [], "safe": []}')
    for name, reason in (("broken", "not valid JSON"), ("other", "not an anchor set"), ("newer", "anchors/9")):
        with pytest.raises(InputError, match=reason):
            AnchorSet.load(tmp_path / f"{name}.json")
    for missing in ("org/none", str(tmp_path / "none.json")):
        with pytest.raises(InputError, match="no anchor set at"):
            AnchorSet.load(missing)
