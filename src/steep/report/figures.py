"""Figures as a reader wants them: grouped thousands, real minus signs, no more digits than they are worth."""

from __future__ import annotations

import math
from datetime import UTC, datetime

MINUS, DASH = "\u2212", "\u2013"


def grouped(value: float | None) -> str:
    """1234567 → ``1,234,567``."""
    return DASH if value is None else f"{value:,.0f}"


def short(value: float | None) -> str:
    """1234567 → ``1.23 M``; for big figures, where the digits behind do not matter."""
    if value is None:
        return DASH
    if abs(value) < 1e4:
        return f"{value:,.0f}"
    power = 1
    while abs(value) / 1000**power >= 999.5 and power < 4:
        power += 1
    return f"{value / 1000**power:.3g} {' kMGT'[power]}"


def decimal(value: float | None, digits: int = 3) -> str:
    """1.7249 → ``1.725``."""
    return DASH if value is None or not math.isfinite(value) else f"{value:,.{digits}f}"


def signed(value: float | None, digits: int = 3) -> str:
    """-0.8838 → ``−0.884``; what rounds to nothing has no sign."""
    if value is None or not math.isfinite(value):
        return DASH
    text = f"{abs(value):,.{digits}f}"
    if not any(character in "123456789" for character in text):
        return text
    return (MINUS if value < 0 else "+") + text


def percent(share: float | None, digits: int = 0) -> str:
    """0.345 → ``34 %``. What is above nothing is not shown as nothing, nor what is below all as all."""
    if share is None or not math.isfinite(share):
        return DASH
    text, step = f"{100 * share:.{digits}f}", 10.0**-digits
    if share > 0 and float(text) == 0:
        return f"<{step:g} %"
    if share < 1 and float(text) == 100:
        return f">{100 - step:g} %"
    return f"{text} %"


def rate(value: float | None) -> str:
    """5e-05 → ``5e-5``."""
    if value is None:
        return DASH
    if value and (abs(value) < 1e-2 or abs(value) >= 1e4):
        digits, exponent = f"{value:.3g}".split("e") if "e" in f"{value:.3g}" else f"{value:.2e}".split("e")
        if "." in digits:
            digits = digits.rstrip("0").rstrip(".")
        return f"{digits}e{int(exponent)}"
    return f"{value:.4g}"


def perplexity(value: float | None) -> str:
    return DASH if value is None else decimal(value, 0 if value >= 100 else 2)


def moment(seconds: float | None) -> str:
    """Seconds since the epoch → ``2026-03-01 14:05 UTC``."""
    return DASH if seconds is None else f"{datetime.fromtimestamp(seconds, UTC):%Y-%m-%d %H:%M} UTC"
