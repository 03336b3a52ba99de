"""What objects show in a notebook, and the example notebook, executed by a real kernel on the real model."""

from __future__ import annotations

from pathlib import Path

import nbformat
import pytest
from datasets import Dataset
from IPython.core.interactiveshell import InteractiveShell
from nbclient import NotebookClient

from hf_safefilter import refusal_rate, select_risky
from hf_safefilter.notebook import dataset_html

NOTEBOOK = Path(__file__).parent.parent / "examples" / "notebook.ipynb"
ROWS = [
    {"prompt": "<script>alert(1)</script>", "completion": "a & b " * 100, "risk_a": 0.5, "risk_b": None, "risk_status": "ok"},
    {"prompt": "Two", "completion": "2", "risk_a": 1.5, "risk_b": 2.0, "risk_status": "ok"},
]


@pytest.fixture
def shell():
    shell = InteractiveShell.instance()
    yield shell
    InteractiveShell.clear_instance()


def test_the_extension_shows_scored_datasets_and_no_others(shell):
    scored, plain = Dataset.from_list(ROWS), Dataset.from_list(ROWS).select_columns(["prompt", "completion"])
    html = lambda value: shell.display_formatter.format(value)[0].get("text/html")  # noqa: E731
    assert html(scored) is None
    shell.extension_manager.load_extension("hf_safefilter")
    assert "<caption>2 of 2 rows</caption>" in html(scored)
    assert html(plain) is None
    assert "<caption>1 of 1 rows</caption>" in html(select_risky(scored, k=1, by="risk_a"))
    shell.extension_manager.unload_extension("hf_safefilter")
    assert html(scored) is None


def test_rows_are_escaped_and_cut():
    html = dataset_html(Dataset.from_list(ROWS), rows=1)
    assert "&lt;script&gt;alert(1)&lt;/script&gt;" in html
    assert "<script" not in html
    assert "a &amp; b" in html
    assert "…" in html
    assert "<td>0.5</td><td>none</td>" in html
    assert "1 of 2 rows" in html
    assert dataset_html(Dataset.from_list([{"risk_a": 1.0, "x": "no layout"}])) is None
    four = Dataset.from_list([{f"risk_{n}": 1.0 for n in "abcde"} | {"text": "x"}])
    assert "2 more score columns" in dataset_html(four)


def test_refusal_rates_show_themselves():
    html = refusal_rate(["I cannot help with that.", "Sure: <b>"], judge="keyword_prefix")._repr_html_()
    assert "<th>refused</th><td>50.0%</td>" in html
    assert "<th>n</th><td>2</td>" in html
    none = refusal_rate(["", ""])._repr_html_()
    assert "<td>not known</td>" in none
    assert "<th>not evaluated</th>" in none


def test_the_example_notebook(tmp_path):
    notebook = nbformat.read(NOTEBOOK, 4)
    shown = lambda cell: "".join(o.get("data", {}).get("text/html", "") for o in cell.outputs)  # noqa: E731
    kept = [shown(cell) for cell in notebook.cells if cell.cell_type == "code"]
    assert any("<caption>Estimate</caption>" in html for html in kept), "committed without its output"
    NotebookClient(notebook, timeout=600, kernel_name="python3", resources={"metadata": {"path": str(tmp_path)}}).execute()
    found = [shown(cell) for cell in notebook.cells if cell.cell_type == "code"]
    captions = ["SafetyRiskScorer", "Estimate", "10 of 48 rows, 1 more score column", "5 of 5 rows, 1 more score column"]
    for html, caption in zip(found, captions, strict=False):
        assert f"<caption>{caption}</caption>" in html
    assert "<th>refused</th><td>66.7%</td>" in found[-1]
    assert (tmp_path / "report.html").stat().st_size > 10_000
    # The same rows are riskiest as in what is committed: scores are no accident of the machine.
    assert found[3].count("<tr>") == kept[3].count("<tr>") == 6
    first = lambda html: html.split("<tbody>")[1].split("</td>")[0]  # noqa: E731
    assert first(found[3]) == first(kept[3])
