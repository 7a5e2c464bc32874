"""The page, the tables and the figures that an experiment leaves."""

from __future__ import annotations

import base64
import html
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from diffmask_fast.analysis.findings import Finding, write
from diffmask_fast.files import replacing
from diffmask_fast.report.tables import Cell, Table, written


@dataclass(frozen=True)
class Section:
    """A heading of the page, with what stands below it.

    Attributes:
        title: the heading.
        text: what the reader should know about it, one paragraph each.
        findings: tables with their figures.
        pictures: more figures: by caption, the name of the file and what draws it into the file that it is given.
        links: pages in the same folder: words, and the path from there.
    """

    title: str
    text: Sequence[str] = ()
    findings: Sequence[Finding] = ()
    pictures: Mapping[str, tuple[str, Callable[[Path], Any]]] = field(default_factory=dict)
    links: Sequence[tuple[str, str]] = ()


def write_report(folder: Path, title: str, sections: Sequence[Section]) -> None:
    """Write `tables/*.md` and `.csv`, `figures/*.png` and `.pdf`, and `report.html` with all of them in it."""
    for name in ("tables", "figures"):
        shutil.rmtree(folder / name, ignore_errors=True)  # none that an earlier version left
        (folder / name).mkdir()
    figures = folder / "figures"
    body = [f"<h1>{html.escape(title)}</h1>"]
    for section in sections:
        write(section.findings, folder)
        body.append(f"<section><h2>{html.escape(section.title)}</h2>")
        body += [f"<p>{html.escape(text)}</p>" for text in section.text]
        for finding in section.findings:
            body.append(_table(finding.table))
            body += [_picture(finding.table.title, figures / f"{name}.png") for name in finding.figures]
        for caption, (name, draw) in section.pictures.items():
            for ending in ("pdf", "png"):
                draw(figures / f"{name}.{ending}")
            body.append(_picture(caption, figures / f"{name}.png"))
        body += [f'<p><a href="{html.escape(path)}">{html.escape(words)}</a></p>' for words, path in section.links]
        body.append("</section>")
    page = _PAGE.replace("TITLE", html.escape(title), 1).replace("BODY", "\n".join(body), 1)
    with replacing(folder / "report.html") as temporary:
        temporary.write_text(page, encoding="utf-8", newline="\n")


def _table(table: Table) -> str:
    head = "".join(f"<th scope=col>{html.escape(name)}</th>" for name in table.columns)
    rows = "".join("<tr>" + "".join(_cell(value) for value in row) + "</tr>" for row in table.rows)
    caption = f"<caption>{html.escape(table.title)}</caption>"
    return f"<div class=wide><table>{caption}<thead><tr>{head}</tr></thead><tbody>{rows}</tbody></table></div>"


def _cell(value: Cell) -> str:
    kind = "" if isinstance(value, str) else " class=number"
    return f"<td{kind}>{html.escape(written(value))}</td>"


def _picture(caption: str, png: Path) -> str:
    data = base64.b64encode(png.read_bytes()).decode()
    words = html.escape(caption)
    return f'<figure><img src="data:image/png;base64,{data}" alt="{words}"><figcaption>{words}</figcaption></figure>'


_PAGE = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; style-src 'unsafe-inline'; img-src data:">
<link rel="icon" href="data:,">
<title>TITLE</title>
<style>
body { font: 16px/1.5 system-ui, "Segoe UI", Roboto, Helvetica, Arial, sans-serif; color: #14191c; background: #f4f6f7;
  margin: 0 auto; max-width: 62rem; padding: 1.75rem 1.25rem 3rem; }
h1 { font-size: 1.5rem; line-height: 1.25; }
h2 { font-size: 1.15rem; margin: 0 0 .5rem; }
section { background: #fff; border: 1px solid #d9dfe2; border-radius: 10px; padding: 1rem 1.15rem; margin: 1rem 0; }
p { margin: .4rem 0; max-width: 46rem; }
.wide { overflow-x: auto; }
table { border-collapse: collapse; font-size: .875rem; margin: .75rem 0; }
caption { text-align: left; color: #56636a; padding-bottom: .3rem; }
th, td { padding: .2rem .7rem .2rem 0; text-align: left; border-bottom: 1px solid #d9dfe2; white-space: nowrap; }
.number { text-align: right; font-variant-numeric: tabular-nums; }
figure { margin: 1rem 0; }
img { max-width: 100%; height: auto; }
figcaption { color: #56636a; font-size: .875rem; }
a { color: #00625b; }
</style>
</head>
<body>
BODY
</body>
</html>
"""
