"""Debian's Chromium, headless and offline, driven by Playwright."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from playwright.sync_api import sync_playwright

_FLAGS = (
    "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking",
    "--disable-component-update", "--disable-sync",
)  # fmt: skip


@dataclass
class Opened:
    """A page, and everything that it said or asked for."""

    page: Any
    console: list[str] = field(default_factory=list)
    requests: list[str] = field(default_factory=list)
    dialogs: list[str] = field(default_factory=list)


def chromium_path() -> str:
    """The browser. CI must have one (`.ci/run` installs it); elsewhere tests that need it are skipped."""
    path = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if path is None:
        message = "no Chromium here: apt-get install chromium"
        (pytest.fail if os.environ.get("CI") else pytest.skip)(message)
    return path


@contextmanager
def opened(file: Path, width: int = 1200, scheme: str = "light") -> Iterator[Opened]:
    """The page in a new browser that reaches nothing."""
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=chromium_path(), args=list(_FLAGS))
        context = browser.new_context(color_scheme=scheme, viewport={"width": width, "height": 900}, offline=True)
        found = Opened(context.new_page())
        found.page.on("console", lambda m: found.console.append(m.text))
        found.page.on("pageerror", lambda e: found.console.append(str(e)))
        found.page.on("request", lambda r: found.requests.append(r.url))
        found.page.on("dialog", lambda d: (found.dialogs.append(d.message), d.dismiss()))
        found.page.goto(file.as_uri())
        found.page.wait_for_selector("#table tbody tr")
        try:
            yield found
        finally:
            browser.close()
