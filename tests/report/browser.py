"""A real browser for the tests of the page: Debian's Chromium, driven by playwright."""

from __future__ import annotations

import shutil


def chromium() -> str | None:
    """The path of an installed Chromium or Chrome; playwright's own download is not used."""
    names = ("chromium", "chromium-browser", "google-chrome", "chrome")
    return next((found for name in names if (found := shutil.which(name))), None)
