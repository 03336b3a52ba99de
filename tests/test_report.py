"""The report: what it shows, that it is honest about counts, and that hostile rows stay text, in a real browser."""

from __future__ import annotations

import json
import math
import re
import time
from pathlib import Path

import numpy as np
import pytest
from axe_playwright_python.sync_playwright import Axe
from browser import opened
from datasets import Dataset

from hf_safefilter import cli, filter_risky, select_risky
from hf_safefilter.errors import InputError
from hf_safefilter.report import gather, scored_report

HOSTILE = [
    "<script>alert(1)</script>",
    '</script><script>alert(2)</script><img src="https://example.com/x.png" onerror="alert(3)">',
    "\u202eright to left \u05e9\u05dc\u05d5\u05dd </td></table>",
    "'\"`${alert(4)}{{ 7 * 7 }}{% raw %}\u2028\u2029\x00\x1b[31m",
    "x" * 50_000,
    "<!--<script>",
]
RUN = {
    "data": "<b>rows</b>.jsonl", "score_columns": ["risk_gradient"],
    "model": {"model": {"kind": "hub", "name": "org/<i>model</i>", "fingerprint": "abc"}, "adapter": None, "dtype": "float32"},
    "anchors": {"name": "built-in", "sha256": "0" * 64}, "fingerprint": "1" * 64, "versions": {"torch": "2.13.0"},
}  # fmt: skip


def dataset(n: int = 300, seed: int = 0) -> Dataset:
    """Scored rows, the hostile ones riskiest, the last without a score."""
    rng = np.random.default_rng(seed)
    balanced = rng.normal(size=n).astype(np.float32)
    balanced[: len(HOSTILE)] = [9 - i for i in range(len(HOSTILE))]
    texts = [*HOSTILE, *(f"1. one {i}\n2. two" if i % 3 else f"Answer number {i}." for i in range(len(HOSTILE), n))]
    scores = [float(s) for s in balanced[:-1]] + [None]
    return Dataset.from_dict(
        {
            "prompt": [f"Question {i}" if i >= len(HOSTILE) else HOSTILE[i] for i in range(n)],
            "completion": texts,
            "kind": ["list" if i % 3 else "plain" for i in range(n)],
            "risk_gradient_balanced": scores,
            "risk_gradient": [None if s is None else float(np.float32(-2 * s)) for s in scores],
            "attribution_tokens": [["<b>", text[:5], " more"] for text in texts[:-1]] + [[]],
            "attribution": [[0.5, -0.25, 0.01]] * (n - 1) + [[]],
            "risk_status": ["ok"] * (n - 1) + ["completion is <empty>"],
        }
    )


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory):
    folder = tmp_path_factory.mktemp("report")
    history = [{"step": s, "eval_refusal_rate": r, "eval_refusal_rate_benign": 0.1, "eval_refusal_margin": 5.0 - s}
               for s, r in ((0, 1.0), (5, 0.6), (10, 0.1))]  # fmt: skip
    (folder / "history.jsonl").write_text(
        "".join(json.dumps(e) + "\n" for e in [*history, {"step": 11, "eval_refusal_margin": -1.0}])
    )
    arm = {"attack_success_rate": {"mean": 0.5, "interval": [0.4, 0.6]}, "rows": 100, "held_out_loss": 1.25}
    failed = {"attack_success_rate": None, "rows": 100, "held_out_loss": None}
    study = {"arms": {"top": arm, "<u>bottom</u>": failed}, "separates": False, "by": "risk_gradient"}
    (folder / "summary.json").write_text(json.dumps(study))
    report = scored_report(dataset(), folder / "report.html", title="Rows <&>", run=RUN, monitor=folder, validate=folder)
    return folder / "report.html", report


def test_the_page_holds_every_row_and_exact_scores(page) -> None:
    content = page[1].content
    assert (content.rows, content.scored, content.by) == (300, 299, "risk_gradient_balanced")
    assert content.shown[:6] == [0, 1, 2, 3, 4, 5]
    assert content.shown[-1] == 299
    assert sorted(content.shown) == list(range(300))
    assert content.correlations[0][1] == pytest.approx(-1)
    assert content.unscored == {"completion is <empty>": 1}
    assert [g["rows"] for g in content.common] == [30, 269]
    assert len(content.responses[4]) == 2000
    assert page[0].stat().st_size < 200_000


def test_nothing_hostile_runs_and_nothing_leaves_the_page(page) -> None:
    with opened(page[0]) as found:
        assert found.dialogs == []
        assert found.console == []
        assert found.requests == [page[0].as_uri()]
        cells = found.page.locator("#table tbody td.text")
        assert cells.nth(0).locator("span").all_text_contents() == [HOSTILE[0]] * 2
        assert cells.nth(1).locator("span").all_text_contents() == [HOSTILE[1]] * 2
        assert (
            found.page.locator("#table tbody img, #table tbody script, main script, main img, main b, main i, main u").count()
            == 0
        )
        assert found.page.locator("h1").text_content() == "Rows <&>"
        assert "org/<i>model</i>" in found.page.locator(".facts").text_content()
        # The policy itself: a script or a picture put in afterwards does nothing.
        found.page.evaluate(
            """() => { const s = document.createElement("script"); s.textContent = "window.ran = 1"; document.body.append(s);
                       const i = document.createElement("img"); i.src = "https://example.com/x"; document.body.append(i); }"""
        )
        assert found.page.evaluate("() => window.ran") is None
        assert all("Content Security Policy" in line for line in found.console)
        assert len(found.console) == 2


def test_the_snippet_removes_what_the_page_says(page) -> None:
    ds = dataset()

    def check(found) -> int:
        snippet = found.page.locator("#snippet").text_content()
        scope: dict = {"scored": ds}
        exec(snippet, scope)
        said = [
            int(n.replace(",", ""))
            for n in re.findall(r"([\d,]+) rows removed, ([\d,]+) kept", found.page.inner_text("#counts"))[0]
        ]
        assert said == [len(ds) - len(scope["clean"]), len(scope["clean"])]
        assert f"# {said[0]} of 300" in snippet
        return said[0]

    with opened(page[0]) as found:
        assert check(found) == 30
        found.page.focus("#threshold")
        for _ in range(50):
            found.page.keyboard.press("ArrowLeft")
        moved = check(found)
        assert moved > 30
        assert found.page.locator("#histogram rect.removed").count() > 0
        found.page.fill("#share", "0")
        assert check(found) == 0
        found.page.fill("#share", "100")
        assert check(found) == 299
        found.page.fill("#share", "25")
        assert check(found) == 75
        found.page.select_option("#score", "risk_gradient")
        assert check(found) == 30
        assert 'by="risk_gradient"' in found.page.locator("#snippet").text_content()
        found.page.select_option("#which", "removed")
        assert found.page.inner_text("#found") == "30 of 300 rows"


def test_sort_search_and_pages(page) -> None:
    ds = dataset()
    with opened(page[0]) as found:
        rows = lambda: [int(n) for n in found.page.locator("#table tbody td:first-child").all_text_contents()]  # noqa: E731
        index = ds.add_column("i", range(len(ds)))
        assert rows() == select_risky(index, k=20, unscored="drop")["i"][:]
        found.page.click("th[data-sort=risk_gradient] button")
        assert found.page.get_attribute("th[data-sort=risk_gradient]", "aria-sort") == "descending"
        assert rows() == select_risky(index, k=20, by="risk_gradient", unscored="drop")["i"][:]
        found.page.click("th[data-sort=risk_gradient] button")
        assert rows()[:6] == [0, 1, 2, 3, 4, 5]
        found.page.select_option("#sort", "row/up")
        assert rows() == list(range(20))
        found.page.click("#next")
        assert rows() == list(range(20, 40))
        found.page.fill("#search", "ANSWER number 24")
        assert rows() == [24, 240, 243, 246, 249]
        assert found.page.inner_text("#found") == "5 of 300 rows"
        found.page.fill("#search", "no such words")
        assert rows() == []
        found.page.fill("#search", "question 299")
        assert rows() == [299]
        assert found.page.locator("#table tbody td").nth(1).text_content() == "–"


def test_of_many_scores_the_table_shows_three(tmp_path: Path) -> None:
    ds = dataset(30)
    for i, name in enumerate("abcd"):
        ds = ds.add_column(f"risk_{name}", [float((7 * j + i) % 30) for j in range(30)])
    scored_report(ds, tmp_path / "report.html")
    with opened(tmp_path / "report.html") as found:
        heads = lambda: [h.get_attribute("data-sort") for h in found.page.locator("#table th[data-sort]").all()]  # noqa: E731
        assert heads() == ["row", "risk_gradient_balanced", "risk_gradient", "risk_a"]
        found.page.select_option("#sort", "risk_d/down")
        assert heads() == ["row", "risk_gradient_balanced", "risk_gradient", "risk_d"]
        assert found.page.locator("#table tbody td").nth(3).text_content() == "29"
        found.page.select_option("#score", "risk_c")
        assert heads() == ["row", "risk_gradient_balanced", "risk_c", "risk_d"]
        found.page.click("th[data-sort=risk_c] button")
        assert found.page.evaluate("() => document.activeElement.parentElement.dataset.sort") == "risk_c"
        assert found.console == []


def test_long_answers_are_folded(page) -> None:
    with opened(page[0]) as found:
        cell = found.page.locator("#table tbody td.text").nth(4).locator("details.long")
        assert cell.locator(".response").is_hidden()
        cell.locator("summary").focus()
        found.page.keyboard.press("Enter")
        assert cell.locator(".response").is_visible()
        assert len(cell.locator(".response").text_content()) == 2000


def test_tokens_behind_the_score(page) -> None:
    with opened(page[0]) as found:
        fold = found.page.locator("#table tbody tr").nth(0).locator("details.heat")
        fold.locator("summary").click()
        assert fold.locator("mark").all_text_contents() == ["<b>", HOSTILE[0][:5]]
        assert [m.get_attribute("class") for m in fold.locator("mark").all()] == ["up4", "down2"]
        assert fold.locator(".response").text_content() == "<b>" + HOSTILE[0][:5] + " more"
        assert found.console == []
        assert [v["id"] for v in Axe().run(found.page).response["violations"]] == []


def test_charts_of_scores_and_of_a_monitored_run(page) -> None:
    with opened(page[0]) as found:
        assert found.page.inner_text("#correlation") == "Spearman's rank correlation over all rows: -1.00"
        dots = "".join(p.get_attribute("d") for p in found.page.locator("#scatter path.dots").all())
        assert dots.count("M") == 299
        assert len(found.page.locator("#history polyline").first.get_attribute("points").split()) == 3
        heights = [float(r.get_attribute("height")) for r in found.page.locator("#histogram rect").all()]
        assert len(heights) == 60
        assert max(heights) > 0
        text = found.page.locator("#h-study").locator("..").text_content()
        assert "40% to 60%" in text
        assert "<u>bottom</u>" in text
        assert "do not filter by this score" in text


@pytest.mark.parametrize(("scheme", "width"), [("light", 1200), ("dark", 1200), ("light", 390), ("dark", 390)])
def test_accessible_and_no_wider_than_the_screen(page, scheme: str, width: int) -> None:
    with opened(page[0], width, scheme) as found:
        result = Axe().run(found.page)
        assert [(v["id"], v["impact"]) for v in result.response["violations"]] == []
        assert len(result.response["passes"]) > 15  # it did look
        assert found.page.evaluate("() => document.documentElement.scrollWidth") <= width


def test_ten_thousand_rows(tmp_path: Path) -> None:
    ds = dataset(10_000)
    for name in ("a", "b", "c", "d", "e"):
        ds = ds.add_column(f"risk_{name}", [float(v) for v in np.random.default_rng(1).normal(size=10_000)])
    started = time.perf_counter()
    report = scored_report(ds, tmp_path / "report.html")
    print(f"built in {time.perf_counter() - started:.2f} s, {len(report.html.encode()) / 1000:.0f} kB")
    assert (tmp_path / "report.html").stat().st_size < 1_000_000
    assert len(report.content.columns) + len(report.content.left_out) == 7
    assert 0 < report.content.full < 10_000
    with opened(tmp_path / "report.html") as found:
        milliseconds = found.page.evaluate(
            """() => { const started = performance.now(); document.querySelector("th[data-sort=row] button").click();
                       return performance.now() - started; }"""
        )
        print(f"sorted in {milliseconds:.0f} ms")
        assert found.page.locator("#table tbody td").first.text_content() == "0"
        assert found.page.inner_text("#found") == "10,000 of 10,000 rows"


def test_more_rows_than_a_page_holds(tmp_path: Path) -> None:
    ds = dataset(12_000)
    report = scored_report(ds, tmp_path / "report.html")
    assert len(report.content.shown) == 10_000
    kept = set(filter_risky(ds.add_column("i", range(12_000)), k=10_000, unscored="keep")["i"][:])
    assert set(report.content.shown).isdisjoint(kept)
    with opened(tmp_path / "report.html") as found:
        assert found.page.locator("#score option").all_text_contents() == ["risk_gradient_balanced"]
        assert "1,200 rows removed, 10,800 kept" in found.page.inner_text("#counts")
        scope: dict = {"scored": ds}
        exec(found.page.locator("#snippet").text_content(), scope)
        assert len(scope["clean"]) == 10_800


@pytest.mark.parametrize("n", [1, 2, 5])
def test_few_rows(tmp_path: Path, n: int) -> None:
    ds = Dataset.from_dict({"prompt": ["p"] * n, "completion": ["c"] * n, "risk_x": [float(i) for i in range(n)]})
    scored_report(ds, tmp_path / "report.html")
    with opened(tmp_path / "report.html") as found:
        assert found.console == []
        assert found.page.inner_text("#found") == f"{n} of {n} rows"
        assert found.page.locator("#scatter").count() == 0


def test_a_constant_score_removes_none_at_first(tmp_path: Path) -> None:
    ds = Dataset.from_dict({"prompt": ["p"] * 9, "completion": ["c"] * 9, "risk_x": [0.5] * 9, "risk_y": [0.0] * 9})
    report = scored_report(ds, tmp_path / "report.html", by="risk_x")
    assert report.content.correlations == [[None, None], [None, None]]
    with opened(tmp_path / "report.html") as found:
        assert found.console == []
        assert "0 rows removed, 9 kept" in found.page.inner_text("#counts")
        found.page.fill("#share", "30")
        assert "9 rows removed, 0 kept" in found.page.inner_text("#counts")  # equal rows go together
        assert "constant" in found.page.inner_text("#correlation")


def test_in_a_notebook_the_page_is_a_sandboxed_document(page) -> None:
    shown = page[1]._repr_html_()
    assert shown.startswith("<iframe srcdoc=")
    assert 'sandbox="allow-scripts"' in shown
    assert "<script" not in shown


def test_the_command_finds_the_account_beside_the_rows(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    dataset(20).to_parquet(str(tmp_path / "scored.parquet"))
    (tmp_path / "run.json").write_text(json.dumps(RUN))
    out = tmp_path / "page.html"
    assert cli.main(["report", str(tmp_path), "-o", str(out), "--json", "--quiet"]) == 0
    said = json.loads(capsys.readouterr().out)
    assert said == {"out": str(out), "bytes": out.stat().st_size, "rows": 20, "scored": 19, "by": "risk_gradient_balanced"}
    assert "org/&lt;i&gt;model&lt;/i&gt;" in out.read_text("utf-8")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"rows": lambda ds: ds.select([])}, "no rows"),
        (
            {"rows": lambda ds: ds.select([19])},
            "no row has a score in 'risk_gradient_balanced'; the first row: completion is <empty>",
        ),
        ({"rows": lambda ds: ds.remove_columns(["risk_gradient", "risk_gradient_balanced"])}, "no risk_... column"),
        ({"rows": lambda ds: ds.rename_column("completion", "c")}, "cannot tell prompt from response"),
        ({"more": ["--by", "risk_nothing"]}, "no column 'risk_nothing' in the dataset"),
        ({"more": ["--by", "completion"]}, "does not hold numbers"),
        ({"more": ["--run", "no.json"]}, "cannot read the account of a scoring run from no.json"),
        ({"more": ["--monitor", "no.jsonl"]}, "cannot read the monitor's history no.jsonl"),
        ({"more": ["--validate", "no"]}, "cannot read a study's summary from no"),
        ({"out": "no/such/folder/page.html"}, "cannot write"),
    ],
)
def test_bad_input_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str], change: dict, message: str) -> None:
    rows = change.get("rows", lambda ds: ds)(dataset(20))
    rows.to_parquet(str(tmp_path / "rows.parquet"))
    out = tmp_path / change.get("out", "page.html")
    assert cli.main(["report", str(tmp_path / "rows.parquet"), "-o", str(out), "--quiet", *change.get("more", [])]) == 1
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1
    assert not out.exists()


def test_not_a_dataset_and_damaged_files(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="needs a datasets.Dataset with scores, got list"):
        gather([{"risk_x": 1.0}])
    (tmp_path / "history.jsonl").write_text('{"rate": 1}\n')
    with pytest.raises(InputError, match="no checks with a step"):
        gather(dataset(20), monitor=tmp_path)
    (tmp_path / "summary.json").write_text("[]")
    with pytest.raises(InputError, match="is not a study's summary"):
        gather(dataset(20), validate=tmp_path)


def test_rows_that_cannot_be_read_keep_their_place() -> None:
    ds = Dataset.from_dict({"messages": [[{"role": "user", "content": "hi"}, {"role": "assistant", "content": "yes"}], None],
                            "risk_x": [1.0, math.nan]})  # fmt: skip
    content = gather(ds)
    assert content.prompts == ["hi", ""]
    assert content.responses == ["yes", ""]
    assert content.shown == [0, 1]
