"""A real browser for the tests of the page: Debian's Chromium, driven by playwright."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from playwright.sync_api import Browser, Page

WIDE, NARROW = 1440, 390
Open = Callable[..., "Page"]


def chromium() -> str | None:
    """The path of an installed Chromium or Chrome; playwright's own download is not used."""
    names = ("chromium", "chromium-browser", "google-chrome", "chrome")
    return next((found for name in names if (found := shutil.which(name))), None)


def wait_until(page: Page, condition: str) -> None:
    """Until a JavaScript expression is true. playwright's own way evaluates it inside the page, at all but the first
    look, which the page's policy forbids."""
    for _ in range(300):
        if page.evaluate(condition):
            return
        page.wait_for_timeout(50)
    raise AssertionError(f"never true: {condition}")


@contextmanager
def opening(browser: Browser) -> Iterator[Open]:
    """Opens an address, and at the end finds the console clean and no request to anywhere else."""
    said: list[str] = []
    pages: list[Any] = []

    def go(address: str, width: int = WIDE, scheme: Any = "light") -> Page:
        page = browser.new_page(viewport={"width": width, "height": 900}, color_scheme=scheme)
        origin = address if address.startswith("file:") else "/".join(address.split("/")[:3])
        page.on("console", lambda message: said.append(message.text))
        page.on("pageerror", lambda error: said.append(str(error)))
        page.on(
            "request",
            lambda request: None if request.url.startswith((origin, "data:,")) else said.append(request.url),
        )
        page.set_default_timeout(15_000)
        page.goto(address)
        page.wait_for_selector("html[data-drawn]")
        pages.append(page)
        return page

    yield go
    for page in pages:
        page.close()
    assert said == []
