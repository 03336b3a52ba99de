"""How objects show themselves in a notebook."""

from __future__ import annotations

from collections.abc import Mapping
from html import escape


def facts_html(caption: str, facts: Mapping[str, object]) -> str:
    """Names and values as an HTML table; both are escaped."""
    lines = "".join(f"<tr><th>{escape(str(name))}</th><td>{escape(str(value))}</td></tr>" for name, value in facts.items())
    return f"<table><caption>{escape(caption)}</caption>{lines}</table>"
