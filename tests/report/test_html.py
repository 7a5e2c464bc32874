"""The page as a file: what it holds and what it must not. test_page.py looks at it in a browser."""

from __future__ import annotations

import base64
import hashlib
import json
import re
from html import unescape
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from repeated import repeated

from diffmask_fast.attribution import Attributions
from diffmask_fast.report import html


def page(attributions: Attributions, folder: Path, **kwargs: Any) -> str:
    html.write(attributions, folder / "page.html", **kwargs)
    return (folder / "page.html").read_text(encoding="utf-8")


def embedded(text: str) -> dict[str, Any]:
    found = re.search(r'<script type="application/json" id="data">(.*?)</script>', text, re.DOTALL)
    assert found
    return json.loads(found[1])


def unpacked(text: dict[str, Any], sites: int) -> np.ndarray:
    return np.frombuffer(base64.b64decode(text["keep"]), "<u2").reshape(-1, sites) / 1000


def test_the_page_holds_every_value_to_three_digits(squad: Attributions, tmp_path: Path) -> None:
    data = embedded(page(squad, tmp_path))
    for text, ours in zip(data["texts"], squad, strict=True):
        # half a unit of the third digit, and one at the threshold, where rounding may not cross it
        assert np.abs(unpacked(text, 14) - ours.keep.double().numpy()).max() <= 0.001
        assert text["kl"] == pytest.approx(ours.divergence.tolist(), abs=0.000501)
        assert (text["tokens"], text["original"], text["masked"]) == (ours.tokens, ours.original, ours.masked)
    assert data["curves"][2]["values"] == pytest.approx(squad.mean_keep(2).tolist(), abs=0.000501)


def test_rounding_never_moves_a_token_over_the_threshold(sst: Attributions, tmp_path: Path) -> None:
    near = torch.tensor([0.5, 0.50001, 0.49999, 0.5 + 2**-24, 0.50049, 0.50051, 0.0, 1.0])
    sst.keep[:8, 0] = near
    drawn = unpacked(embedded(page(sst, tmp_path))["texts"][0], 8)[:8, 0]
    assert (drawn > 0.5).tolist() == (near > 0.5).tolist()
    assert drawn[-2:].tolist() == [0, 1]


def test_no_token_can_end_the_script_it_stands_in(sst: Attributions, tmp_path: Path) -> None:
    hostile = "</script><script>alert(1)</script><!--\u2028\ud800&lt;"
    sst.tokens[0][1] = sst.original[0] = sst.masked[0][0] = hostile
    sst.meta[hostile] = hostile
    text = page(sst, tmp_path, title=hostile.replace("\ud800", ""))
    assert text.count("<script") == text.count("</script>") == 2  # the data and the code
    assert "alert(1)" in text and "<!--" not in text and "\u2028" not in text.split("</title>")[1]
    data = embedded(text)
    assert data["texts"][0]["tokens"][1] == data["meta"][hostile] == hostile


def test_a_title_that_looks_like_a_placeholder_stays_what_it_is(sst: Attributions, tmp_path: Path) -> None:
    text = page(sst, tmp_path, title="{{data}} \\1 & <b>")
    assert "<title>{{data}} \\1 &amp; &lt;b&gt;</title>" in text
    assert embedded(text)["title"] == "{{data}} \\1 & <b>"


def test_the_policy_allows_the_one_script_and_no_connection(sst: Attributions, tmp_path: Path) -> None:
    text = page(sst, tmp_path)
    policy = re.search(r'Content-Security-Policy"\s+content="([^"]+)"', text)
    script = re.search(r"<script>(.*)</script>", text, re.DOTALL)
    assert policy and script
    digest = base64.b64encode(hashlib.sha256(script[1].encode()).digest()).decode()
    assert "default-src 'none'" in policy[1] and f"script-src 'sha256-{digest}'" in policy[1]


def test_the_page_names_no_other_address(squad: Attributions, tmp_path: Path) -> None:
    addresses = set(re.findall(r"https?://[^\s\"'<]+", page(squad, tmp_path)))
    assert addresses == {"http://www.w3.org/2000/svg"}  # a namespace, never fetched


def test_the_page_is_never_written_as_markup(sst: Attributions, tmp_path: Path) -> None:
    for way in (
        "innerHTML",
        "outerHTML",
        "insertAdjacentHTML",
        "document.write",
        "eval(",
        "srcdoc",
        "onclick",
    ):
        assert way not in page(sst, tmp_path)


def test_the_same_attributions_give_the_same_page(squad: Attributions, tmp_path: Path) -> None:
    assert page(squad, tmp_path) == page(squad, tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["page.html"]


def test_a_value_takes_less_than_three_bytes(squad: Attributions, tmp_path: Path) -> None:
    many = repeated(squad, 50)
    one, all_of_them = len(page(squad, tmp_path)), len(page(many, tmp_path))
    texts = 49 * (len(json.dumps([squad.tokens, squad.original, squad.masked])) + 14 * 3 * len("0.000,1,") + 3 * 200)
    assert all_of_them - one < 3 * 49 * squad.keep.numel() + texts


def test_no_texts_and_one_text_are_refused(sst: Attributions, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="at least one text"):
        page(sst[:0], tmp_path)
    with pytest.raises(TypeError, match="slice it"):
        page(sst[0], tmp_path)  # type: ignore[arg-type]


def test_a_folder_that_does_not_exist_is_named(sst: Attributions, tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="create it first"):
        page(sst, tmp_path / "nowhere")


def test_a_frame_holds_the_whole_page(sst: Attributions, tmp_path: Path) -> None:
    path = tmp_path / "page.html"
    html.write(sst, path)
    around = r'<div><iframe srcdoc="([^"]*)" width="100%" height="500" style="border: 0"></iframe></div>'
    held = re.fullmatch(around, html.frame(sst, height=500))
    assert held and unescape(held[1]) == path.read_text(encoding="utf-8")
    for height in (0, -1, 2.5, True):
        with pytest.raises(ValueError, match="height is"):
            html.frame(sst, height=height)
