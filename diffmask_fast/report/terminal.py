"""Attributions in the terminal: tokens coloured by P(keep), or in braces where they are dropped."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import IO

from rich import box
from rich.console import Console, OverflowMethod
from rich.style import Style
from rich.table import Table
from rich.text import Text

from diffmask_fast.attribution import SEGMENT_NAMES, Attribution, Attributions
from diffmask_fast.attribution.result import KEPT_ABOVE
from diffmask_fast.report import has_two_segments, pieces, printable, require_many, require_one
from diffmask_fast.report.tables import Cell, written

BAR = 12  # cells

# From dim to bright, one hue: order survives colour blindness and greyscale. Tokens carry their own
# background, so they can be read on a light terminal too; on a dark one what is dropped steps back.
_LOW, _HIGH = (38, 46, 48), (130, 235, 220)
_DARK_INK_FROM = 0.425  # where black and white ink have the same contrast, above 4.5 to 1


def show(attribution: Attribution, site: int | None = None, file: IO[str] | None = None) -> None:
    """Print one text: its tokens coloured by P(keep) at a site, the prediction before and after, and the KL.

    Without `site`, a table of all sites comes first, and the tokens are shown at the last one. Where there is
    no colour (a pipe, a file, NO_COLOR), the tokens that the masked prediction is made without are in braces.

    Args:
        attribution: one text, as in `attributions[0]`.
        site: a site's number, 0 is the embedding.
        file: where to print; standard output if None.

    Raises:
        TypeError: `attribution` is not one text.
        ValueError: there is no such site.
    """
    require_one(attribution)
    names = attribution.site_names
    if site is not None and (isinstance(site, bool) or not isinstance(site, int) or not 0 <= site < len(names)):
        listed = ", ".join(f"{i} {name}" for i, name in enumerate(names))
        raise ValueError(f"site {site!r} does not exist; the sites are {listed}")
    console = Console(file=file, highlight=False)
    if site is None:
        console.print(_sites_of_one(attribution, console))
        site = len(names) - 1
    colour = console.color_system is not None and not console.no_color
    kept = int((attribution.keep[:, site] > KEPT_ABOVE).sum())
    console.print(_plain(console, f"\n{names[site]}: {kept} of {len(attribution)} tokens kept"), style="bold")
    console.print(_coloured(attribution, site) if colour else _braced(attribution, site, console))
    console.print(_legend(colour))
    same = "same prediction" if attribution.kept_prediction[site] else "prediction changed"
    before, after = (printable(text) or "(empty)" for text in (attribution.original, attribution.masked[site]))
    console.print(_plain(console, f"\nwhole text  {before}\nmasked      {after}"))
    console.print(f"KL          {attribution.divergence[site]:.3f} nats, {same}")


def summary(attributions: Attributions, file: IO[str] | None = None) -> None:
    """Print a table by site: mean P(keep), mean KL, and how often the masked prediction is the original one.

    Raises:
        TypeError, ValueError: `attributions` is not `Attributions`, or has no text.
    """
    require_many(attributions)
    console = Console(file=file, highlight=False)
    count = f"{len(attributions):,} text{'s' if len(attributions) > 1 else ''}"
    table = _table(f"{attributions.method}, {attributions.masking} masking, {count}", console)
    segments = (1, 2) if has_two_segments(attributions) else ()
    for name in ("mean KL", "same"):
        table.add_column(name, justify="right")
    for segment in segments:
        table.add_column(SEGMENT_NAMES[segment], justify="right")
    keep = attributions.mean_keep().tolist()
    parts = [attributions.mean_keep(segment=s).tolist() for s in segments]
    divergence = attributions.divergence.double().mean(0).tolist()
    same = attributions.kept_prediction.double().mean(0).tolist()
    for i, name in enumerate(attributions.site_names):
        table.add_row(
            _plain(console, f"{i:>2} {name}"),
            f"{_bar(keep[i], console)} {keep[i]:.3f}",
            f"{divergence[i]:.3f}",
            f"{same[i]:.1%}",
            *(f"{part[i]:.3f}" for part in parts),
        )
    console.print(table)
    console.print("same: how often the masked prediction is the original one", style="dim")


def _table(title: str, console: Console) -> Table:
    # columns are cut, not ended with an ellipsis, where the stream has none
    overflow: OverflowMethod = "crop" if console.options.ascii_only else "ellipsis"
    table = Table(title=_plain(console, title), title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False)
    table.add_column("site", no_wrap=True, overflow=overflow)
    table.add_column("mean P(keep)", no_wrap=True, overflow=overflow, min_width=BAR + 6)
    return table


def _sites_of_one(attribution: Attribution, console: Console) -> Table:
    table = _table(f"{attribution.method}, {attribution.masking} masking", console)
    table.add_column("KL", justify="right")
    overflow: OverflowMethod = "crop" if console.options.ascii_only else "ellipsis"
    table.add_column("masked prediction", no_wrap=True, overflow=overflow)
    for i, mean in enumerate(attribution.keep.double().mean(0).tolist()):
        mark = "= " if attribution.kept_prediction[i] else "! "
        table.add_row(
            _plain(console, f"{i:>2} {attribution.site_names[i]}"),
            f"{_bar(mean, console)} {mean:.3f}",
            f"{attribution.divergence[i]:.3f}",
            _plain(console, mark + (printable(attribution.masked[i]) or "(empty)")),
        )
    return table


def _pieces(attribution: Attribution, site: int) -> Iterator[tuple[tuple[bool, str], float]]:
    return zip(pieces(attribution), attribution.keep[:, site].tolist(), strict=True)


def _coloured(attribution: Attribution, site: int) -> Text:
    text = Text()
    for i, ((continues, shown), keep) in enumerate(_pieces(attribution, site)):
        if i and not continues:
            text.append(" ")
        text.append(printable(shown), _style(keep))
    return text


def _braced(attribution: Attribution, site: int, console: Console) -> Text:
    out, inside = "", False
    for i, ((continues, shown), keep) in enumerate(_pieces(attribution, site)):
        dropped = keep <= KEPT_ABOVE
        if inside and not dropped:
            out += "}"
        if i and not continues:
            out += " "
        if dropped and not inside:
            out += "{"
        out += printable(shown)
        inside = dropped
    return _plain(console, out + "}" * inside)


def _legend(colour: bool) -> Text:
    if not colour:
        return Text("{dropped} kept", style="dim")
    text = Text.assemble(("P(keep) ", "dim"))
    for keep in (0.0, 0.25, 0.5, 0.75, 1.0):
        text.append(f" {keep:g} ", _style(keep))
    return text.append(f"  underlined: above {KEPT_ABOVE:g}, kept for the masked prediction", style="dim")


def _style(keep: float) -> Style:
    red, green, blue = (round(low + (high - low) * keep) for low, high in zip(_LOW, _HIGH, strict=True))
    ink = "#000000" if keep >= _DARK_INK_FROM else "#ffffff"
    return Style(color=ink, bgcolor=f"#{red:02x}{green:02x}{blue:02x}", underline=keep > KEPT_ABOVE)


def _bar(share: float, console: Console) -> str:
    full, rest = ("#", ".") if console.options.ascii_only else ("█", "░")
    cells = round(share * BAR)
    return full * cells + rest * (BAR - cells)


def _plain(console: Console, text: str) -> Text:
    """Text that is printed as it stands: no markup, nothing that the stream's encoding lacks."""
    lines = "\n".join(printable(line) for line in text.split("\n"))
    return Text(lines.encode(console.encoding, "backslashreplace").decode(console.encoding))


def table(title: str, columns: Sequence[str], rows: Iterable[Sequence[Cell]], file: IO[str] | None = None) -> None:
    """Print a table of names and numbers."""
    console = Console(file=file)
    shown = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False)
    for i, column in enumerate(columns):
        shown.add_column(column, justify="right" if i else "left")
    for row in rows:
        shown.add_row(*(f"{value:.4f}" if isinstance(value, float) else written(value) for value in row))
    console.print(shown)
