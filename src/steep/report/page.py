"""Runs as one HTML page that needs nothing beside itself.

All text of a run is untrusted: templates escape it, JSON is written so that it cannot end its script tag, and the
page's own content security policy lets no script run but the two that it was made with, and no address be opened.
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
from collections.abc import Sequence
from functools import cache
from importlib.metadata import version
from importlib.resources import files
from pathlib import Path
from statistics import median
from typing import Any

from steep.amounts import human_bytes
from steep.errors import UserError
from steep.report import comparison, figures
from steep.report.accounts import (
    FATES,
    MOST_NAMES,
    OUTCOMES,
    accounts,
    incident_line,
    incident_texts,
    ledger_line,
    not_trained,
    proof_groups,
    proof_line,
)
from steep.report.curves import charts, smooth, smoothing_span
from steep.report.read import Run, read_runs
from steep.report.verdict import changes, headline
from steep.run_folder import RunFolder

PARTS = {
    "verdict": "Verdict",
    "domains": "Learned and kept",
    "training": "Training",
    "samples": "Samples",
    "machine": "Speed and memory",
    "ledger": "Ledger",
    "proof": "Proof",
    "settings": "Settings",
}
MOST_SAMPLES = 40  # prompts shown of one run
LONGEST_TEXT = 4_000  # characters shown of one prompt or completion
LONGEST_FILE = 60_000  # characters shown of one run file


def write_report(paths: Sequence[Path], output: Path | None = None) -> Path:
    """Write the page of one run, or of several beside each other.

    Args:
        output: the file; default: ``report.html`` in the run folder, or here for several runs.

    Raises:
        UserError: there is no run, a file of it is damaged, the output is no place for a page, or the extra is missing.
    """
    for path in paths:
        if not (path / "run.yaml").is_file():
            raise UserError("RUN", f"{path} holds no run", "Give the output_dir of a run, such as runs/ko.")
    output = output or (paths[0] / "report.html" if len(paths) == 1 else Path("report.html"))
    if output.suffix not in (".html", ".htm") or output.is_dir():
        raise UserError("-o", f"{output} is not the name of a page", "Give a file that ends in .html.")
    page = render_page(read_runs(paths))
    folder = RunFolder(output.parent)
    folder.check_place("-o")
    folder.make("-o")
    folder.write_text(output.name, page)
    return output


def render_page(runs: Sequence[Run], *, live: bool = False) -> str:
    """The whole page.

    Args:
        live: it comes from `watch`, and asks there for what is new.

    Raises:
        UserError: the extra is missing.
    """
    data = page_data(runs)
    scripts = [plot_library(), _text("page.js")]
    policy = "; ".join(
        [
            "default-src 'none'",
            f"script-src {' '.join(_digest(script) for script in scripts)}",
            "style-src 'unsafe-inline'",
            f"connect-src {chr(39)}{'self' if live else 'none'}{chr(39)}",
            "img-src data:",
            "base-uri 'none'",
            "form-action 'none'",
        ]
    )
    from markupsafe import Markup

    return (
        _templates()
        .get_template("page.html.j2")
        .render(
            title=" · ".join(run.label for run in runs),
            policy=policy,
            style=Markup(_text("page.css")),
            scripts=[Markup(script) for script in scripts],
            parts=PARTS,
            html={name: Markup(html) for name, html in data["parts"].items()},
            data=data | {"live": live, "parts": {}},
        )
    )


def page_data(runs: Sequence[Run]) -> dict[str, Any]:
    """What changes on the page while a run goes on: ``{"parts": {name: html}, "charts", "empty", "finished", ...}``."""
    drawn, thinned = charts(runs)
    scores = comparison.scores(runs)
    context: dict[str, Any] = {
        "runs": runs,
        "several": len(runs) > 1,
        "thinned": thinned,
        "speeds": {run.label: _speed(run) for run in runs},
        "losses": {run.label: _losses(run) for run in runs},
        "scores": scores,
        "ahead": comparison.headline(runs, scores),
        "settings": comparison.differing_settings(runs),
        "samples": {run.label: _samples(run) for run in runs},
        "steep": version("steep"),
    }
    templates = _templates()
    html = {name: templates.get_template(f"parts/{name}.html.j2").render(context).strip() for name in PARTS}
    return {
        "parts": html,
        "charts": [chart.as_dict() for chart in drawn],
        "empty": [name for name in PARTS if not html[name] and not any(chart.group == name for chart in drawn)],
        "finished": all(run.finished for run in runs),
        "written": max((run.written for run in runs if run.written is not None), default=None),
    }


def _speed(run: Run) -> float | None:
    rates = [row["tokens_per_second"] for row in run.metrics if row.get("tokens_per_second") is not None]
    return median(rates) if rates else None


def _losses(run: Run) -> tuple[float, float] | None:
    """The first logged loss, and the smoothed one at the newest step."""
    values = [row["loss"] for row in run.metrics if row.get("loss") is not None]
    if not values:
        return None
    newest = smooth(values, smoothing_span(len(run.metrics)))[-1]
    assert newest is not None
    return values[0], newest


def _samples(run: Run) -> list[dict[str, Any]]:
    """``[{"prompt", "completions": [{"step", "text"}, ...]}]``: the first and the newest completion of each prompt."""
    prompts: dict[str, list[dict[str, Any]]] = {}
    for row in run.samples:
        prompts.setdefault(row["prompt"], []).append({"step": row["step"], "text": _cut(row["completion"])})
    return [
        {"prompt": _cut(prompt), "completions": texts if len(texts) < 2 else [texts[0], texts[-1]]}
        for prompt, texts in prompts.items()
    ]


def _cut(text: str, longest: int = LONGEST_TEXT) -> str:
    return text if len(text) <= longest else f"{text[:longest]} … ({len(text) - longest:,} more characters)"


@cache
def _templates() -> Any:
    from jinja2 import Environment, PackageLoader, StrictUndefined

    templates = Environment(
        loader=PackageLoader("steep.report", "."),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    templates.policies["json.dumps_kwargs"] = {"separators": (",", ":"), "ensure_ascii": False, "allow_nan": False}
    functions = (
        *(figures.grouped, figures.short, figures.decimal, figures.signed, figures.percent, figures.rate),
        *(figures.perplexity, figures.moment, human_bytes, changes, headline, accounts, ledger_line, proof_line),
        *(proof_groups, not_trained, incident_line, incident_texts, _cut),
    )
    templates.globals |= {function.__name__.lstrip("_"): function for function in functions}
    templates.globals |= {
        "FATES": FATES,
        "MOST_NAMES": MOST_NAMES,
        "OUTCOMES": OUTCOMES,
        "MOST_SAMPLES": MOST_SAMPLES,
        "LONGEST_FILE": LONGEST_FILE,
    }
    return templates


@cache
def plot_library() -> str:
    """Vega's JavaScript, which defines `vegaEmbed`. Bundling takes about a second.

    Raises:
        UserError: the extra is missing.
    """
    try:
        from vl_convert import javascript_bundle
    except ModuleNotFoundError as error:
        raise UserError(
            "steep report", f"the package {error.name} is not installed", "Install it: pip install 'steep[report]'"
        ) from error
    bundle = javascript_bundle("window.vegaEmbed = vegaEmbed;")
    library = f"{{\n{bundle}\n}}"  # in a block, or its names would be global
    assert not re.search(r"</script|<!--|<script|\r", library, re.IGNORECASE)  # could end the tag, or its digest fail
    return library


def _digest(script: str) -> str:
    return f"'sha256-{base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()}'"


@cache
def _text(name: str) -> str:
    return files("steep.report").joinpath(name).read_text(encoding="utf-8")


def as_json(data: dict[str, Any]) -> str:
    """JSON for `watch`, which sends it as data and not as a part of a page."""
    return json.dumps(data, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
