"""Attributions that look like those of a trained probe. Nothing was trained: values are drawn from a seed."""

from __future__ import annotations

import pytest
import torch

from diffmask_fast.attribution import Attributions

SQUAD = [
    (
        "where did super bowl 50 take place ?",
        "super bowl 50 was an american football game to determine the champion of the national football "
        "league ( nfl ) for the 2015 season . the american football conference ( afc ) champion denver "
        "bron ##cos defeated the national football conference ( nfc ) champion carolina panthers 24 - 10 "
        "to earn their third super bowl title . the game was played on february 7 , 2016 , at levi ' s "
        "stadium in the san francisco bay area at santa clara , california .",
        "santa clara , california",
    ),
    (
        "who designed the garden for the university library ?",
        "another important library - the university library , founded in 1816 , is home to over two "
        "million items . the building was designed by architects marek bud ##zy ##nski and z ##big ##nie "
        "##w bad ##owski and opened on 15 december 1999 . it is surrounded by green . the university "
        "library garden , designed by irena ba ##jer ##ska , was opened on 12 june 2002 .",
        "irena ba ##jer ##ska",
    ),
    (
        "what is the price of the $ x _ 1 ^ 2 $ bond ?",
        "the $ x _ 1 ^ 2 $ bond , named after its yield curve \\ frac { a } { b } , sold for € 4 . 2 "
        "million in 東 京 while the other bond sold for less .",
        "€ 4 . 2 million",
    ),
]
SST = [
    ("a gorgeous , witty , seductive movie .", "gorgeous witty seductive", "very positive"),
    ("it ' s not without its pleasures , but the whole never adds up .", "not but never", "negative"),
    ("an un ##func ##tion ##al mess of a film that wastes a fine cast .", "mess wastes", "very negative"),
    (
        "<img src=x onerror=document.title='owned'> is what a hostile review looks like </script>",
        "hostile",
        "neutral",
    ),
]


def _curve(tokens: list[str], wanted: set[str], sites: int, seed: int) -> torch.Tensor:
    """(T, S): a token fades at a depth of its own; those that carry the answer stay."""
    generator = torch.Generator().manual_seed(seed)
    depth = 0.15 + 0.75 * torch.rand(len(tokens), 1, generator=generator)
    depth[torch.tensor([token in wanted for token in tokens])] = 1.15
    depth[torch.tensor([token in ".,()'-" for token in tokens])] *= 0.5
    at = torch.linspace(0, 1, sites)[None]
    noise = 0.02 * torch.rand(len(tokens), sites, generator=generator)
    return (torch.sigmoid((depth - at) * 14) - noise).clamp(0, 1)


def make(texts: list[tuple[list[str], list[int], set[str], str, str]], sites: int) -> Attributions:
    names = ("embedding", *(f"layer {i}" for i in range(sites - 2)), "last")[-sites:]
    keep = torch.cat([_curve(tokens, wanted, sites, i) for i, (tokens, _, wanted, _, _) in enumerate(texts)])
    at = torch.linspace(0, 1, sites)
    fails = torch.tensor([[i % 3 == 2 and site > 0.7 for site in at.tolist()] for i in range(len(texts))])
    divergence = (0.3 * at**2)[None] + 1.4 * fails + 0.01 * torch.arange(len(texts))[:, None]
    return Attributions(
        tokens=[tokens for tokens, *_ in texts],
        site_names=names,
        keep=keep,
        segments=torch.tensor([s for _, segments, *_ in texts for s in segments], dtype=torch.int8),
        divergence=divergence.float(),
        original=[original for *_, original, _ in texts],
        masked=[
            [other if failed else original for failed in row]
            for row, (*_, original, other) in zip(fails.tolist(), texts, strict=True)
        ],
        kept_prediction=~fails,
        meta={"model": "a fixture, not a model", "seed": 0, "tolerance": 1.0},
    )


def squad(sites: int = 14) -> Attributions:
    texts = []
    for question, passage, answer in SQUAD:
        q, p = question.split(), passage.split()
        tokens = ["[CLS]", *q, "[SEP]", *p, "[SEP]"]
        segments = [0] + [1] * len(q) + [0] + [2] * len(p) + [0]
        wanted = {*answer.split(), *q[:2], "[CLS]", "[SEP]"}
        texts.append((tokens, segments, wanted, answer.replace(" ##", ""), "the game"))
    return make(texts, sites)


def sst(sites: int = 8) -> Attributions:
    texts = []
    for text, wanted, label in SST:
        words = text.split() if "<img" not in text else [text[:42], *text[43:].split()]
        texts.append(
            (
                ["[CLS]", *words, "[SEP]"],
                [0] + [1] * len(words) + [0],
                {*wanted.split(), "[CLS]"},
                label,
                "neutral",
            )
        )
    return make(texts, sites)


@pytest.fixture(name="squad")
def squad_fixture() -> Attributions:
    return squad()


@pytest.fixture(name="sst")
def sst_fixture() -> Attributions:
    return sst()
