"""Attributions as one page for the browser: no network, no build step, nothing to install to read it.

The page holds its data as JSON and shows one text at a time, so a thousand texts are a matter of file size
only. Whatever a token says, it stays text: the page sets textContent alone, and its content security policy
allows the one script that was shipped with it, by hash, and no connection anywhere.
"""

from __future__ import annotations

import base64
import hashlib
import html
import json
import os
import re
from importlib.resources import files
from typing import Any

import torch
from torch import Tensor

from diffmask_fast.attribution import SEGMENT_NAMES, Attribution, Attributions
from diffmask_fast.attribution.result import KEPT_ABOVE
from diffmask_fast.files import replacing
from diffmask_fast.report import has_two_segments, pieces, require_many

# Inside <script> these could end the element or start a comment; escaped they are the same JSON.
_ESCAPES = {ord("<"): "\\u003c", ord(">"): "\\u003e", ord("&"): "\\u0026"}


def write(attributions: Attributions, path: str | os.PathLike[str], title: str = "Which tokens are needed") -> None:
    """Write a self-contained page: tokens coloured by P(keep), a slider over sites, averages over all texts.

    Values are rounded to three digits. The page is replaced in one step.

    Args:
        attributions: at least one text.
        path: the file to write, ending in .html.
        title: the heading of the page.

    Raises:
        TypeError, ValueError: `attributions` is not `Attributions`, or has no text.
        FileNotFoundError: the folder of `path` does not exist.
    """
    page = _page(attributions, title)
    with replacing(path) as temporary:
        temporary.write_text(page, encoding="utf-8", newline="\n")


def frame(attributions: Attributions, title: str = "Which tokens are needed", height: int = 700) -> str:
    """The same page as an element that a notebook can show: `IPython.display.HTML(frame(attributions))`.

    Args:
        attributions, title: as for `write`.
        height: of the element, in pixels.

    Raises:
        TypeError, ValueError: as `write`; a height that is no whole number above 0.
    """
    if not isinstance(height, int) or isinstance(height, bool) or height < 1:
        raise ValueError(f"height is {height!r}; expected a whole number of pixels, 1 or more")
    page = html.escape(_page(attributions, title))
    return f'<div><iframe srcdoc="{page}" width="100%" height="{height}" style="border: 0"></iframe></div>'


def _page(attributions: Attributions, title: str) -> str:
    require_many(attributions)
    template = files("diffmask_fast.report").joinpath("page.html").read_text(encoding="utf-8")
    script = re.search(r"<script>(.*)</script>", template, re.DOTALL)
    assert script, "page.html has one <script> without attributes"
    digest = base64.b64encode(hashlib.sha256(script[1].encode()).digest()).decode()
    # ensure_ascii also escapes U+2028 and lone surrogates
    data = json.dumps(_data(attributions, title), ensure_ascii=True, separators=(",", ":")).translate(_ESCAPES)
    parts = {"title": html.escape(title), "script_hash": f"sha256-{digest}", "data": data}
    # one pass: a title that reads {{data}} stays what it is
    return re.sub(r"\{\{(\w+)\}\}", lambda match: parts[match[1]], template)


def _data(attributions: Attributions, title: str) -> dict[str, Any]:
    curves = [("all tokens", attributions.mean_keep())]
    if has_two_segments(attributions):
        curves += [(SEGMENT_NAMES[segment], attributions.mean_keep(segment)) for segment in (1, 2)]
    return {
        "title": title,
        "method": attributions.method,
        "masking": attributions.masking,
        "sites": list(attributions.site_names),
        "segments": list(SEGMENT_NAMES),
        "keptAbove": KEPT_ABOVE,
        "meta": attributions.meta,
        "curves": [{"name": name, "values": _rounded(values)} for name, values in curves],
        "kl": _rounded(attributions.divergence.double().mean(0)),
        "same": _rounded(attributions.kept_prediction.double().mean(0)),
        "texts": [_text(text) for text in attributions],
    }


def _text(text: Attribution) -> dict[str, Any]:
    shown = pieces(text)
    return {
        "tokens": text.tokens,
        "shown": {i: words for i, (_, words) in enumerate(shown) if words != text.tokens[i]},
        "joins": "".join(str(int(continues)) for continues, _ in shown),
        "segments": "".join(map(str, text.segments.tolist())),
        "keep": _packed(text.keep),
        "kl": _rounded(text.divergence),
        "original": text.original,
        "masked": text.masked,
        "same": [int(same) for same in text.kept_prediction.tolist()],
    }


def _rounded(values: Tensor) -> list[float]:
    return [round(value, 3) for value in values.tolist()]


def _packed(keep: Tensor) -> str:
    """P(keep) in thousandths, as little-endian 16-bit numbers in base64: a third of the size of decimal JSON.

    The page compares with the threshold, so a value just above it must not be rounded onto it.
    """
    thousandths = (keep.double() * 1000).round().to(torch.int32)
    threshold = round(KEPT_ABOVE * 1000)
    thousandths[(keep > KEPT_ABOVE) & (thousandths <= threshold)] = threshold + 1
    pairs = torch.stack([thousandths % 256, thousandths // 256], -1).to(torch.uint8).flatten()
    raw = bytearray(pairs.numel())
    torch.frombuffer(raw, dtype=torch.uint8).copy_(pairs)
    return base64.b64encode(raw).decode()
