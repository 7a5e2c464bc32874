"""All that can be said about saved attributions, in one go."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from diffmask_fast.analysis import findings as tables
from diffmask_fast.analysis.agreement import agreement
from diffmask_fast.analysis.findings import Finding
from diffmask_fast.analysis.groups import kept_sites, segment_regions, shares
from diffmask_fast.analysis.squad_scores import answer_tokens, squad_scores
from diffmask_fast.analysis.words import load_tagger, located, parts_of_speech, rebuilt
from diffmask_fast.attribution import Attributions
from diffmask_fast.data import FIRST, SECOND, SPECIAL
from diffmask_fast.report import has_two_segments
from diffmask_fast.tasks.squad import Answer


def analyse(
    runs: Sequence[Attributions],
    texts: Sequence[str | tuple[str, str]] | None = None,
    tokenizer: Any = None,
    answers: Sequence[Sequence[Answer]] | None = None,
    tagger: Any = None,
) -> list[Finding]:
    """By part of speech, by segment and site, how often [CLS] is the largest, and whether several runs agree.

    Args:
        runs: attributions; what is found for each is numbered where there are several.
        texts, tokenizer: of all runs; without them words are rebuilt from the tokens, see `rebuilt`.
        answers: gold answers of SQuAD questions: then also exact match, F1 and the answer's tokens; needs `texts`.
        tagger: see `parts_of_speech`.

    Raises:
        TypeError, ValueError: as the single analyses.
        ImportError: no tagger is installed.
    """
    if not runs:
        raise ValueError("no attributions: give at least one")
    if (texts is None) != (tokenizer is None):
        raise TypeError("texts and tokenizer belong together: give both or none")
    if answers is not None and texts is None:
        raise TypeError("answers are counted in the characters of the texts: give texts and tokenizer too")
    tagger = load_tagger() if tagger is None else tagger
    found = []
    for number, one in enumerate(runs):
        end = f"-{number}" if len(runs) > 1 else ""
        parts = rebuilt(one) if texts is None else located(one, texts, tokenizer)
        answer = right = None
        if answers is not None:
            scores = squad_scores(one, answers)
            right = (scores.exact_match[:, 0] > 0).tolist()
            answer = answer_tokens(one, parts, answers)
            found.append(tables.score_finding(one, scores, f"scores{end}"))
        tags = parts_of_speech(one, parts, tagger)
        found.append(tables.group_finding(one, kept_sites(one, tags), f"part-of-speech{end}", "part of speech"))
        if has_two_segments(one):
            for segment, where in ((FIRST, "question"), (SECOND, "passage")):
                kinds = one.segments.tolist()
                own = [tag if kind in (segment, SPECIAL) else None for tag, kind in zip(tags, kinds, strict=True)]
                groups = kept_sites(one, own)
                name, what = f"part-of-speech-{where}{end}", f"part of speech in the {where}"
                found.append(tables.group_finding(one, groups, name, what))
        regions = shares(one, segment_regions(one, answer, right))
        found += tables.share_findings(one, regions, end)
        found.append(tables.first_finding(one, f"first-token{end}"))
    for alike in comparable(runs):
        one = alike[0]
        name = "agreement" if len(comparable(runs)) == 1 else f"agreement-{one.method}-{one.masking}"
        found.append(tables.agreement_finding(alike, agreement(alike), name))
    return found


def comparable(runs: Sequence[Attributions]) -> list[list[Attributions]]:
    """The runs of the same method on the same sites, where there are several."""
    groups: dict[tuple, list[Attributions]] = {}
    for run in runs:
        groups.setdefault((run.method, run.masking, run.site_names), []).append(run)
    return [group for group in groups.values() if len(group) > 1]


def read_runs(paths: Sequence[Path]) -> list[Attributions]:
    """Files that `Attributions.save` wrote, or folders of runs with one."""
    return [Attributions.load(path / "attributions.safetensors" if path.is_dir() else path) for path in paths]
