"""Time DiffMask per example for every sentence of a file in one go, against one sentence at a time.

    python bench/per_example.py --folder MODEL --data TREES.txt [--method NAME] [--site N] [--batches 1 16 64]
        [--alone N] [--texts N] [--json FILE]

MODEL is a classifier, TREES a file of the Stanford Sentiment Treebank. A batch size of 1 is timed on `--alone` of the
sentences, evenly taken by length, the others on all of them: so its time is by sentence. Memory is the most that the
call held at once beyond what was there before, its result among it.
"""

from __future__ import annotations

import argparse
import time
from typing import Any

import measure
from transformers import AutoTokenizer

from diffmask_fast.attribution.attribute import attribute
from diffmask_fast.attribution.result import KEPT_ABOVE, Attributions
from diffmask_fast.data import Examples, encode
from diffmask_fast.models import load_for
from diffmask_fast.moments import Moments, state_moments
from diffmask_fast.tasks.sst import read_sst

METHODS = ("diffmask-per-example", "reinforce")
WARMED = 2  # sentences


def row(model: Any, texts: Examples, method: str, moments: dict[int, Moments], batch_size: int) -> dict[str, Any]:
    found: list[tuple[float, Attributions]] = []

    def run(chosen: Examples = texts) -> None:
        start = time.perf_counter()
        said = attribute(model, chosen, method=method, sites=[*moments], moments=moments, batch_size=batch_size)
        found.append((time.perf_counter() - start, said))

    peak = measure.peak_extra_bytes(run, "cpu", warm_up=lambda: run(texts.select(range(min(WARMED, len(texts))))))
    seconds, result = found[-1]
    return {
        "method": method,
        "site": result.site_names[0],
        "batch": batch_size,
        "texts": len(texts),
        "tokens": sum(texts.lengths),
        "seconds": round(seconds, 1),
        "seconds_a_text": round(seconds / len(texts), 4),
        "peak_mb": round(peak / 1e6, 1),
        "steps_a_text": round(result.details["steps"].mean().item(), 1),
        "tokens_kept": round((result.keep > KEPT_ABOVE).float().mean().item(), 4),
        "kept_prediction": round(result.kept_prediction.float().mean().item(), 4),
    }


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--folder", required=True, help="a classifier")
    parser.add_argument("--data", required=True, help="trees of the Stanford Sentiment Treebank")
    parser.add_argument("--method", choices=METHODS, default=METHODS[0])
    parser.add_argument("--site", type=int, default=0)
    parser.add_argument("--batches", type=int, nargs="+", default=(1, 16, 64))
    parser.add_argument("--alone", type=int, default=12, help="sentences for a batch size of 1")
    parser.add_argument("--texts", type=int, help="use only so many sentences")
    options = measure.options(str(__doc__), parser)
    if options.device != "cpu":
        raise SystemExit("only the CPU is timed yet: leave --device out")
    if options.alone < 1:
        raise SystemExit(f"--alone is {options.alone}: expected 1 or more sentences")
    model = load_for(options.folder, "Classif")
    sentences = [sentence.text for sentence in read_sst(options.data, limit=options.texts)[0]]
    texts = encode(AutoTokenizer.from_pretrained(options.folder), sentences, model)
    by_length = [i for (i,) in texts.batches(1)]
    alone = texts.select(by_length[:: max(1, len(texts) // options.alone)][: options.alone])
    moments = {options.site: state_moments(model, texts, [options.site])[options.site]}
    rows = []
    for batch_size in options.batches:
        found = row(model, alone if batch_size == 1 else texts, options.method, moments, batch_size)
        rows.append(found | {"threads": options.threads})
        print(*(f"{key} {value}" for key, value in rows[-1].items()), sep=", ", flush=True)
        measure.write_rows(rows, options.json)


if __name__ == "__main__":
    main()
