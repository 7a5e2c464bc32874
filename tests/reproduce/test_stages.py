from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from diffmask_fast.reproduce.stages import Stage, in_words, run_stages


def three(calls: list[str], fail_at: str | None = None) -> list[Stage]:
    def work(name: str) -> Any:
        def run(results: dict) -> Any:
            if name == fail_at:
                raise KeyboardInterrupt
            calls.append(name)
            return {"before": list(results), "pair": (1, 2)}

        return run

    return [Stage(name, f"stage {name}", 0.1, work(name)) for name in ("a", "b", "c")]


def test_each_stage_sees_the_results_of_those_before(tmp_path: Path) -> None:
    results = run_stages(tmp_path, three([]), quiet=True)
    assert [results[name]["before"] for name in results] == [[], ["a"], ["a", "b"]]
    assert results["a"]["pair"] == [1, 2]  # as JSON has it, from the first time on


def test_what_was_interrupted_goes_on_where_it_was(tmp_path: Path) -> None:
    calls: list[str] = []
    with pytest.raises(KeyboardInterrupt):
        run_stages(tmp_path, three(calls, fail_at="c"), quiet=True)
    resumed = run_stages(tmp_path, three(calls), quiet=True)
    assert calls == ["a", "b", "c"]
    whole = run_stages(tmp_path / "whole", three([]), quiet=True)
    assert resumed == whole


def test_a_stage_whose_result_is_removed_runs_again(tmp_path: Path) -> None:
    calls: list[str] = []
    run_stages(tmp_path, three(calls), quiet=True)
    (tmp_path / "stages" / "b.json").unlink()
    run_stages(tmp_path, three(calls), quiet=True)
    assert calls == ["a", "b", "c", "b"]


def test_a_damaged_result_is_said(tmp_path: Path) -> None:
    run_stages(tmp_path, three([]), quiet=True)
    (tmp_path / "stages" / "b.json").write_text('{"result": ')
    with pytest.raises(ValueError, match=r"b\.json is damaged"):
        run_stages(tmp_path, three([]), quiet=True)


def test_every_finished_stage_is_told(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    run_stages(tmp_path, three([]))
    told = capsys.readouterr().err
    assert all(f"stage {name}: 0 s" in told for name in "abc")


def test_times_in_words() -> None:
    assert (in_words(119), in_words(120), in_words(3600)) == ("119 s", "2 min", "60 min")
