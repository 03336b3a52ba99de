"""Publishing on a Hub-compatible server on the loopback, with the real client in a process of its own."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from datasets import Dataset
from hub_server import HubServer
from huggingface_hub import DatasetCard
from test_report import RUN, dataset

from hf_safefilter import SafetyRiskScorer, cli, push_scored_to_hub
from hf_safefilter.cards import BEGIN, DATA_FILE, END, plain, scored_card
from hf_safefilter.errors import InputError
from hf_safefilter.scores import RepresentationScore

GOOD, READ_ONLY = "hf_goodtoken0123456789", "hf_readonly0123456789"


@pytest.fixture
def hub(tmp_path: Path):
    with HubServer(tmp_path / "hub") as server:
        server.root.mkdir()
        server.tokens = {GOOD: ("ann", {"ann", "team"}), READ_ONLY: ("bob", set())}
        yield server


@pytest.fixture
def scored(tmp_path: Path) -> Path:
    folder = tmp_path / "scored"
    folder.mkdir()
    dataset(40).to_parquet(str(folder / "scored.parquet"))
    run = RUN | {"data": "/home/ann/secret place/rows.jsonl", "options": {"device": None}}
    (folder / "run.json").write_text(json.dumps(run))
    return folder


def command(hub: HubServer, tmp_path: Path, *arguments: object, token: str | None = GOOD, code: str | None = None):
    """The command line, or `code`, in a process that knows this Hub only; nothing that it says holds a token."""
    environment = {k: v for k, v in os.environ.items() if k not in ("HF_TOKEN", "HF_HUB_OFFLINE")}
    environment |= {"HF_ENDPOINT": hub.endpoint, "HF_HOME": str(tmp_path / "home"), "HF_HUB_DISABLE_XET": "1"}
    environment |= {"HF_TOKEN": token} if token else {}
    what = ["-c", code] if code else ["-m", "hf_safefilter.cli", *map(str, arguments)]
    done = subprocess.run([sys.executable, *what], capture_output=True, text=True, env=environment, check=False, timeout=120)
    for secret in (GOOD, READ_ONLY):
        assert secret not in done.stdout + done.stderr
    return done


def test_published_read_back_and_filtered_without_a_model(hub: HubServer, scored: Path, tmp_path: Path) -> None:
    done = command(hub, tmp_path, "publish", scored, "ann/scored", "--license", "cc-by-4.0", "--quiet", "--json")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == {"url": f"{hub.endpoint}/datasets/ann/scored", "private": True}
    folder = hub.root / "datasets/ann/scored"
    assert (folder / ".private").exists()
    assert {p.name for p in folder.rglob("*") if p.is_file()} == {
        ".private", "README.md", "run.json", "scores.png", "train-00000-of-00001.parquet",
    }  # fmt: skip
    card = DatasetCard.load(folder / "README.md")
    assert card.data.license == "cc-by-4.0"
    assert card.data.tags == ["hf_safefilter", "safety"]
    assert "secret" not in (folder / "run.json").read_text()
    assert json.loads((folder / "run.json").read_text())["data"] == "rows.jsonl"
    assert any(r.startswith("PUT /lfs/") for r in hub.requests)
    read = command(
        hub, tmp_path,
        code="import sys, json; from datasets import load_dataset; from hf_safefilter import filter_risky\n"
        "scored = load_dataset('ann/scored', split='train')\n"
        "clean = filter_risky(scored, fraction=0.1, by='risk_gradient_balanced', unscored='keep')\n"
        f"scored.to_parquet({str(tmp_path / 'back.parquet')!r}); print(json.dumps([len(clean), 'torch' in sys.modules]))",
    )  # fmt: skip
    assert read.returncode == 0, read.stderr
    assert json.loads(read.stdout.splitlines()[-1])[0] == 36
    back, sent = Dataset.from_parquet(str(tmp_path / "back.parquet")), dataset(40)
    assert back.features == sent.features
    assert back.to_list() == sent.to_list()


def test_the_source_s_license_is_carried_over(hub: HubServer, scored: Path, tmp_path: Path) -> None:
    for name, head in (
        ("rows", "license: cc-by-nc-4.0\n"),
        ("both", "license:\n- mit\n- apache-2.0\n"),
        ("none", "pretty_name: x\n"),
    ):
        (hub.root / f"datasets/org/{name}").mkdir(parents=True)
        (hub.root / f"datasets/org/{name}/README.md").write_text(f"---\n{head}---\n# Rows\n")

    def card(*arguments: str, to: str = "ann/scored") -> DatasetCard:
        done = command(hub, tmp_path, "publish", scored, to, "--quiet", *arguments)
        assert done.returncode == 0, done.stderr
        assert ("license of org/gone is not known" in done.stderr) == ("org/gone" in arguments)
        return DatasetCard.load(hub.root / "datasets" / to / "README.md")

    unknown = card("--source", "org/none")
    assert "license" not in unknown.data.to_dict()
    assert "not said: ask the source" in unknown.text
    assert "license" not in card("--source", "org/gone").data.to_dict()
    # What score wrote says that the rows were on the Hub.
    account = json.loads((scored / "run.json").read_text())
    (scored / "run.json").write_text(json.dumps(account | {"data": "org/rows", "data_on_hub": True}))
    found = card()
    assert (found.data.license, found.data.source_datasets) == ("cc-by-nc-4.0", ["org/rows"])
    assert "| license of the rows | `cc-by-nc-4.0` |" in found.text
    # What stands in the card is a person's decision; what is said now goes before it.
    assert card("--source", "org/both").data.license == "cc-by-nc-4.0"
    assert card("--license", "mit").data.license == "mit"
    both = card("--source", "org/both", to="ann/more")
    assert both.data.license == ["mit", "apache-2.0"]
    assert "| `mit, apache-2.0` |" in both.text


def test_what_a_person_wrote_stays(hub: HubServer, scored: Path, tmp_path: Path) -> None:
    assert command(hub, tmp_path, "publish", scored, "ann/scored", "--quiet").returncode == 0
    path = hub.root / "datasets/ann/scored/README.md"
    text = path.read_text().replace("tags:\n", "language: de\npretty_name: Mine\ntags:\n- mine\n", 1)
    path.write_text(text.replace(BEGIN, f"Read this first.\n\n{BEGIN}") + "\nAnd this last.\n")
    dataset(50).to_parquet(str(scored / "scored.parquet"))
    assert command(hub, tmp_path, "publish", scored, "ann/scored", "--quiet").returncode == 0
    card = DatasetCard.load(path)
    assert (card.data.language, card.data.pretty_name) == ("de", "Mine")
    assert card.data.tags == ["mine", "hf_safefilter", "safety"]
    assert card.text.count(BEGIN) == card.text.count(END) == 1
    before, ours, after = card.text.split(BEGIN)[0], card.text.split(BEGIN)[1].split(END)[0], card.text.split(END)[1]
    assert "Read this first." in before
    assert "And this last." in after
    assert "\n50 fine-tuning rows" in ours


@pytest.mark.parametrize(
    ("arguments", "token", "code", "message"),
    [
        (["ann/scored"], None, 1, "no token for the Hub: run hf auth login or set HF_TOKEN"),
        (["ann/scored"], "hf_wrong", 1, "the Hub does not accept the token"),
        (["ann/scored"], READ_ONLY, 1, "this token may not write to ann/scored"),
        (["stranger/scored"], GOOD, 1, "this token may not write to stranger/scored"),
        (["a b"], GOOD, 1, "'a b' is no name for a Hub repository"),
        (["ann/scored", "--by", "risk_nothing"], GOOD, 1, "no column 'risk_nothing'"),
        (["ann/other"], GOOD, 1, "ann/other holds something else (rows.csv): choose another name"),
        (["ann/open"], GOOD, 1, "ann/open is public: publish there with private=False (--public), or choose another name"),
    ],
)
def test_refused_in_one_line_with_nothing_published(
    hub: HubServer, scored: Path, tmp_path: Path, arguments: list[str], token: str | None, code: int, message: str
) -> None:
    for name, files in (("other", ["rows.csv", ".private"]), ("open", ["README.md"])):
        (hub.root / f"datasets/ann/{name}").mkdir(parents=True)
        for file in files:
            (hub.root / f"datasets/ann/{name}/{file}").write_text("")
    before = sorted(p for p in hub.root.rglob("*") if p.is_file())
    done = command(hub, tmp_path, "publish", scored, *arguments, "--quiet", token=token)
    assert (done.returncode, done.stdout) == (code, "")
    assert message in done.stderr
    assert len([line for line in done.stderr.splitlines() if line.startswith("hf-safefilter: error")]) == 1
    assert "Traceback" not in done.stderr
    assert sorted(p for p in hub.root.rglob("*") if p.is_file()) == before


def test_public_only_when_asked(hub: HubServer, scored: Path, tmp_path: Path) -> None:
    done = command(hub, tmp_path, "publish", scored, "team/scored", "--public", "--quiet")
    assert done.returncode == 0, done.stderr
    assert not (hub.root / "datasets/team/scored/.private").exists()


def test_a_lost_connection_publishes_nothing_and_is_taken_up_again(hub: HubServer, scored: Path, tmp_path: Path) -> None:
    hub.broken_uploads = 100
    done = command(hub, tmp_path, "publish", scored, "ann/scored", "--quiet")
    assert done.returncode == 2
    assert "nothing was published: no connection to the Hub" in done.stderr
    assert "Traceback" not in done.stderr
    assert [p.name for p in (hub.root / "datasets/ann/scored").rglob("*") if p.is_file()] == [".private"]
    hub.broken_uploads = 0
    assert command(hub, tmp_path, "publish", scored, "ann/scored", "--quiet").returncode == 0
    assert (hub.root / "datasets/ann/scored" / DATA_FILE).is_file()
    # What was uploaded is not sent again.
    sent = [r for r in hub.requests if r.startswith("PUT")]
    assert command(hub, tmp_path, "publish", scored, "ann/scored", "--quiet").returncode == 0
    assert [r for r in hub.requests if r.startswith("PUT")] == sent


def test_no_hub_there(scored: Path, tmp_path: Path, hub: HubServer) -> None:
    hub.endpoint = "http://127.0.0.1:9"
    done = command(hub, tmp_path, "publish", scored, "ann/scored", "--quiet")
    assert done.returncode == 2
    assert "nothing was published: no connection to the Hub" in done.stderr


def test_hostile_names_in_the_card_are_code() -> None:
    ds = dataset(20).rename_column("risk_gradient", "risk_`<script>`|x\n# heading")
    model = {"model": {"name": "<img src=x>`\n# no", "fingerprint": "1"}}
    account = {"model": model, "anchors": None, "data": "[a](javascript:b)"}
    card = DatasetCard(scored_card(ds, "risk_gradient_balanced", "ann/x", account, None, None, None, picture=False))
    assert "\n# heading" not in card.text
    assert "\n# no" not in card.text
    for line in card.text.splitlines():
        inside = "".join(line.split("`")[1::2])
        for hostile in ("<script>", "<img", "javascript:", "<empty>"):
            assert line.count(hostile) == inside.count(hostile), line
    assert plain("") == "not said"


def test_not_publishable(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    with pytest.raises(InputError, match="needs a datasets.Dataset"):
        push_scored_to_hub([], "ann/x", token=GOOD)
    with pytest.raises(InputError, match="no row has a score"):
        push_scored_to_hub(dataset(20).select([19]), "ann/x", token=GOOD)
    (tmp_path / "run.json").write_text("{}")
    with pytest.raises(InputError, match="is not the account of a scoring run"):
        push_scored_to_hub(dataset(20), "ann/x", token=GOOD, run=tmp_path)
    (tmp_path / "rows.jsonl").write_text('{"prompt": "p", "completion": "c"}\n')
    assert cli.main(["publish", str(tmp_path / "rows.jsonl"), "ann/x", "--quiet"]) == 1
    assert "no risk_... column: score it first" in capsys.readouterr().err


def test_scorers_and_anchors_round_trip(hub: HubServer, tmp_path: Path, model_folder: Path, anchors) -> None:
    """Pushed from a folder's model; read back, it scores the same without fitting, and only that model."""
    anchors.save(tmp_path / "anchors")
    code = f"""
import json
from hf_safefilter import AnchorSet, SafetyRiskScorer
from hf_safefilter.errors import InputError
from hf_safefilter.scores import RepresentationScore
row = {{"prompt": "Name a colour.", "completion": "Blue, or green."}}
made = SafetyRiskScorer({str(model_folder)!r}, AnchorSet.load({str(tmp_path / "anchors")!r}), ["gradient"], max_length=77)
said = [made.anchors.push_to_hub("ann/anchors"), made.push_to_hub("ann/scorer")]
said.append(AnchorSet.load("ann/anchors") == made.anchors)
import hf_safefilter.session
def no_fit(*args, **kwargs): raise AssertionError("fitted again")
first = made(row)["risk_gradient"]
hf_safefilter.session.fit = no_fit
back = SafetyRiskScorer.from_pretrained("ann/scorer", model={str(model_folder)!r}, tokenizer={str(model_folder)!r})
said += [float(first), float(back(row)["risk_gradient"]), back.max_length]
for arguments in (["ann/scorer"], ["ann/nothing"], ["ann/anchors-x y"]):
    try:
        SafetyRiskScorer.from_pretrained(*arguments)
    except InputError as error:
        said.append(str(error))
print(json.dumps(said))
"""
    done = command(hub, tmp_path, code=code)
    assert done.returncode == 0, done.stderr
    said = json.loads(done.stdout.splitlines()[-1])
    assert said[:3] == [f"{hub.endpoint}/datasets/ann/anchors", f"{hub.endpoint}/ann/scorer", True]
    assert said[3] == pytest.approx(said[4], abs=1e-6)
    assert said[5] == 77
    assert "a model that is not on the Hub: pass model=" in said[6]
    assert "no scorer at 'ann/nothing'" in said[7]
    assert "no scorer at 'ann/anchors-x y'" in said[8]
    for kind, name in (("models", "scorer"), ("datasets", "anchors")):
        card = DatasetCard.load(hub.root / kind / "ann" / name / "README.md")
        assert BEGIN in card.text
        assert (hub.root / kind / "ann" / name / ".private").exists()
    assert str(tmp_path) not in (hub.root / "models/ann/scorer/scorer.json").read_text()


def test_a_saved_scorer_keeps_scores_and_options(tmp_path: Path, model, tokenizer, anchors) -> None:
    made = SafetyRiskScorer(
        model,
        anchors,
        [RepresentationScore(top_n=3), "gradient"],
        tokenizer=tokenizer,
        parameters="last-1",
        max_response_tokens=4,
    )
    made.save_pretrained(tmp_path / "scorer")
    back = SafetyRiskScorer.from_pretrained(tmp_path / "scorer", model=model, tokenizer=tokenizer, max_length=50)
    assert back.scores == made.scores
    assert (back.parameters, back.max_response_tokens, back.max_length) == ("last-1", 4, 50)
    row = {"prompt": "Name a colour.", "completion": "Blue, or green."}
    expected, found = made(row), back(row)
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert found[name] == (value if isinstance(value, str) else pytest.approx(value, abs=1e-6)), name
    assert "<th>scores</th><td>gradient, representation</td>" in back._repr_html_()
    path = tmp_path / "scorer/scorer.json"
    saved = json.loads(path.read_text())
    for change, message in (
        ({"format": "x"}, "has the format 'x'"),
        ({"scores": [{"name": "gradient", "version": 0}]}, "version 0 of the score 'gradient' is not in this version"),
        ({"scores": [{"name": "gradient", "version": 2, "power": 3}]}, "scorer.json is damaged: TypeError"),
        ({"options": None}, "scorer.json is damaged"),
    ):
        path.write_text(json.dumps(saved | change))
        with pytest.raises(InputError, match=message):
            SafetyRiskScorer.from_pretrained(tmp_path / "scorer", model=model, tokenizer=tokenizer)


def test_a_hub_dataset_is_streamed(hub, tmp_path, model_folder, anchors):
    folder = hub.root / "datasets/ann/rows"
    folder.mkdir(parents=True)
    rows = [{"prompt": f"Question {i}?", "completion": "word " * (1 + i % 7)} for i in range(30)]
    (folder / "train.jsonl").write_text("\n".join(map(json.dumps, rows)))
    anchors.save(tmp_path / "anchors.json")
    arguments = ["--model", model_folder, "--anchors", tmp_path / "anchors.json", "--dtype", "float32", "--quiet"]
    done = command(hub, tmp_path, "score", "ann/rows", "--streaming", *arguments, "--out", tmp_path / "out")
    assert done.returncode == 0, done.stderr
    scored = Dataset.from_parquet(str(tmp_path / "out/scored.parquet"))
    assert scored["prompt"][:] == [r["prompt"] for r in rows]
    account = json.loads((tmp_path / "out/run.json").read_text())
    assert (account["data"], account["data_on_hub"]) == ("ann/rows", True)
    assert not list((tmp_path / "home").rglob("*.jsonl")), "the file was downloaded"
