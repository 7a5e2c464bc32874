"""Time exact erasure against the published way: each text's subsets in batches of 128 rows, padded to the longest text.

    python bench/erasure.py --folder MODEL --data TREES.txt [--longest TOKENS] [--texts N] [--json FILE]

MODEL is a BERT that classifies, TREES a file of the Stanford Sentiment Treebank; N of its texts of 8 tokens up to that
many are searched, evenly taken. The published way runs all subsets of one text after the other through the whole model;
its batches are all alike, so one in each turn is timed, and its time for a text follows from the number of subsets.
Ours stops at the first size that has a solution, and is timed from the encoded text to the result. Both take turns,
some texts at a time. Nothing is timed before both found the same for some texts short enough for the published way.
"""

from __future__ import annotations

import argparse
import re
import statistics
import time
from itertools import combinations
from pathlib import Path
from typing import Any, NamedTuple

import measure
import published
import torch
from torch import Tensor
from transformers import AutoTokenizer

from diffmask_fast.attribution.attribute import attribute
from diffmask_fast.attribution.result import Attributions
from diffmask_fast.data import Examples, encode
from diffmask_fast.models import load_for
from diffmask_fast.moments import Moments, state_moments
from diffmask_fast.sites import sites_of

ROWS, GROUP, CHECKED = 128, 8, 4  # rows of a published batch; texts of a turn, and of the comparison
CHECKED_TO = 7  # tokens, which is one published batch
TOLERANCES = (None, 0.1)

Subset = tuple[int, ...]


class Text(NamedTuple):
    """One text as the published way has it: padded, with what the model says about the whole of it."""

    inputs: dict[str, Tensor]
    original: Tensor
    state: Tensor
    subsets: list[Subset]


@torch.no_grad()
def published_text(model: Any, texts: Examples, i: int, site: int, padded_to: int) -> Text:
    length = texts.lengths[i]
    inputs = {
        name: torch.nn.functional.pad(value, (0, padded_to - length))
        for name, value in texts.collate([texts[i]]).items()
    }
    output, states = published.states_of(model, inputs)
    subsets = [subset for size in range(length + 1) for subset in combinations(range(length), size)]
    return Text(inputs, output.logits.log_softmax(-1), states[site], subsets)


@torch.no_grad()
def published_rows(model: Any, text: Text, subsets: list[Subset], site: int, baseline: Tensor) -> tuple[Tensor, Tensor]:
    """Of at most `ROWS` subsets the divergence, and whether the answer is the same."""
    gates = torch.zeros(len(subsets), text.state.shape[1], 1)
    for row, subset in enumerate(subsets):
        gates[row, list(subset)] = 1
    repeated = {name: value.expand(len(subsets), -1) for name, value in text.inputs.items()}
    state = gates * text.state + (1 - gates) * baseline
    masked = published.masked_output(model, repeated, site, state).logits.log_softmax(-1)
    return (text.original.exp() * (text.original - masked)).sum(-1), masked.argmax(-1) == text.original.argmax(-1)


def ours(model: Any, texts: Examples, site: int, moments: Moments, tolerance: float | None) -> Attributions:
    options = {"tolerance": tolerance, "exhaustive_to": max(texts.lengths), "budget": ROWS}
    return attribute(model, texts, method="erasure", sites=[site], moments={site: moments}, **options)


def refuse_if_wrong(model: Any, texts: Examples, site: int, moments: Moments, padded_to: int) -> None:
    """This also warms up both."""
    found = {tolerance: ours(model, texts, site, moments, tolerance) for tolerance in TOLERANCES}
    for i in range(len(texts)):
        text = published_text(model, texts, i, site, padded_to)
        nats, same = published_rows(model, text, text.subsets, site, moments.mean)
        for tolerance, result in found.items():
            keeps = same if tolerance is None else same & (nats <= tolerance)
            keeps[-1] = True  # the whole text
            rows = keeps.nonzero().flatten().tolist()
            size, divergence = min((len(text.subsets[row]), nats[row].item()) for row in rows)
            one = result[i]
            # the search does not tell apart what is closer than 1e-5; twice that for rounding
            if size != one.details["size"] or not abs(divergence - one.divergence) <= 3e-5:
                raise SystemExit(
                    f"{' '.join(one.tokens)}: {size} tokens at {divergence} nats are the answer, ours is "
                    f"{one.details['size'].item()} at {one.divergence.item()}: no time is printed for a wrong result"
                )


def row_of(
    model: Any, texts: Examples, site: int, moments: Moments, tolerance: float | None, padded_to: int
) -> dict[str, Any]:
    seconds: dict[str, list[float]] = {"published": [], "ours": [], "published, to the answer": []}
    forwards = []
    groups = [texts.select(numbers) for numbers in texts.batches(GROUP)]
    for group in groups:
        text = published_text(model, group, 0, site, padded_to)
        batch = text.subsets[len(text.subsets) // 2 :][:ROWS]
        start = time.perf_counter()
        result = ours(model, group, site, moments, tolerance)
        between = time.perf_counter()
        published_rows(model, text, batch, site, moments.mean)
        a_row = (time.perf_counter() - between) / len(batch)
        seconds["published"].append(a_row)
        seconds["published, to the answer"].append(a_row * sum(2**length for length in group.lengths))
        seconds["ours"].append(between - start)
        forwards.append(int(result.details["forwards"].sum()))
    to_answer = sum(seconds["published, to the answer"])
    ratios = [f * p / s for f, p, s in zip(forwards, seconds["published"], seconds["ours"], strict=True)]
    return {
        "site": sites_of(model)[site].name,
        "tolerance": tolerance,
        "texts": len(texts),
        "tokens": [min(texts.lengths), max(texts.lengths)],
        "padded_to": padded_to,
        "forwards_a_second_published": round(1 / statistics.mean(seconds["published"]), 1),
        "forwards_a_second": round(sum(forwards) / sum(seconds["ours"]), 1),
        "speedup": round(statistics.median(ratios), 2),
        "forwards_a_text_published": round(sum(2**length for length in texts.lengths) / len(texts)),
        "forwards_a_text": round(sum(forwards) / len(texts)),
        "seconds_a_text_published": round(to_answer / len(texts), 3),
        "seconds_a_text": round(sum(seconds["ours"]) / len(texts), 3),
        "speedup_to_answer": round(to_answer / sum(seconds["ours"]), 1),
    }


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--folder", required=True, help="a BERT that classifies")
    parser.add_argument("--data", required=True, help="trees of the Stanford Sentiment Treebank")
    parser.add_argument("--longest", type=int, default=12, help="tokens, with [CLS] and [SEP]")
    parser.add_argument("--texts", type=int, default=24)
    options = measure.options(str(__doc__), parser)
    if options.device != "cpu":
        raise SystemExit("only the CPU is timed yet: leave --device out")
    model = load_for(options.folder, "SequenceClassification")
    sentences = [" ".join(re.findall(r"\(\d ([^()]+)\)", line)) for line in Path(options.data).read_text().splitlines()]
    every = encode(AutoTokenizer.from_pretrained(options.folder), sentences, model)
    short = every.select([i for i, length in enumerate(every.lengths) if length <= CHECKED_TO][:CHECKED])
    fitting = [i for i, length in enumerate(every.lengths) if CHECKED_TO < length <= options.longest]
    texts = every.select(fitting[:: max(1, len(fitting) // options.texts)][: options.texts])
    sites = [0, len(sites_of(model)) // 2 - 1, len(sites_of(model)) - 2]
    moments = state_moments(model, every, sites)
    rows = []
    for site in sites:
        refuse_if_wrong(model, short, site, moments[site], max(every.lengths))
        for tolerance in TOLERANCES:
            row = row_of(model, texts, site, moments[site], tolerance, max(every.lengths))
            rows.append(row | {"threads": options.threads})
            print(
                f"{row['site']:10} tolerance {row['tolerance']!s:5} forwards/s "
                f"{row['forwards_a_second_published']:7.1f} {row['forwards_a_second']:7.1f} {row['speedup']:6.2f}x  "
                f"forwards a text {row['forwards_a_text_published']:6} {row['forwards_a_text']:6}  s a text "
                f"{row['seconds_a_text_published']:8.3f} {row['seconds_a_text']:7.3f} {row['speedup_to_answer']:7.1f}x",
                flush=True,
            )
    measure.write_rows(rows, options.json)


if __name__ == "__main__":
    main()
