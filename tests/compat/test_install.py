"""Published code that imports its own gates meets ours, for as long as it is asked for."""

from __future__ import annotations

import importlib
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from diffmask_fast.compat import diffmask, install
from diffmask_fast.compat.install import PROJECTS

GATES = "class DiffMaskGateInput:\n    theirs = True\n\nclass DiffMaskGateHidden:\n    theirs = True\n"
MODEL = "from .gates import DiffMaskGateHidden, DiffMaskGateInput\nfrom ..utils.getter_setter import bert_getter\n"
SCRIPT = """\
import sys
from diffmask.models.model import DiffMaskGateInput
import helper
print(__name__, sys.argv[1:], helper.here, DiffMaskGateInput.__module__)
if "--fail" in sys.argv:
    raise SystemExit(3)
"""


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A package that looks like the published one, with a script beside it."""
    files = {
        "diffmask/__init__.py": "",
        "diffmask/models/__init__.py": "",
        "diffmask/models/gates.py": GATES,
        "diffmask/models/model.py": MODEL,
        "diffmask/utils/__init__.py": "",
        "diffmask/utils/getter_setter.py": "def bert_getter():\n    pass\n",
        "diffmask/utils/plot.py": "",
        "script.py": SCRIPT,
        "helper.py": "here = True\n",
    }
    for name, text in files.items():
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    monkeypatch.syspath_prepend(str(tmp_path))
    yield tmp_path
    for name in [name for name in sys.modules if name.split(".")[0] == "diffmask"]:
        del sys.modules[name]


def test_imports_get_ours_and_the_handle_says_which(project: Path) -> None:
    with install() as installed:
        assert str(installed).startswith("none of diffmask.models.distributions")
        model = importlib.import_module("diffmask.models.model")
        assert model.DiffMaskGateInput is diffmask.DiffMaskGateInput and model.bert_getter is diffmask.bert_getter
        gates = importlib.import_module("diffmask.models.gates")
        assert gates.MLPGate is diffmask.MLPGate and gates.__name__ == "diffmask.models.gates"
        assert installed.replaced == {
            "diffmask.models.gates": "diffmask_fast.compat.gates",
            "diffmask.utils.getter_setter": "diffmask_fast.compat.getters",
        }
        assert "diffmask.models.gates is diffmask_fast.compat.gates" in str(installed)
        assert importlib.import_module("diffmask.utils.plot").__file__.startswith(str(project))


def test_removed_the_published_modules_are_there_again(project: Path) -> None:
    before = list(sys.meta_path)
    installed = install()
    importlib.import_module("diffmask.models.gates")
    installed.remove()
    installed.remove()
    assert sys.meta_path == before
    assert not hasattr(sys.modules["diffmask.models"], "gates")
    assert importlib.import_module("diffmask.models.gates").DiffMaskGateInput.theirs


def test_ours_are_left_alone(project: Path) -> None:
    from diffmask_fast.compat import gates

    before = dict(vars(gates))
    with install():
        importlib.import_module("diffmask.models.gates")
    assert vars(gates) == before and sys.modules["diffmask_fast.compat.gates"] is gates


def test_it_is_refused_when_it_would_come_too_late(project: Path) -> None:
    importlib.import_module("diffmask.models.model")
    with pytest.raises(RuntimeError, match=r"diffmask\.models\.gates is imported already: call install\(\) before"):
        install()


def test_a_second_install_is_refused_once_the_first_has_replaced_something(project: Path) -> None:
    with install():
        importlib.import_module("diffmask.models.gates")
        with pytest.raises(RuntimeError, match="redirected already"):
            install()


def test_an_unknown_project_is_refused() -> None:
    with pytest.raises(ValueError, match="project is 'diffmsk', expected one of diffmask, vision"):
        install("diffmsk")


@pytest.mark.parametrize("ours", sorted({ours for modules in PROJECTS.values() for ours in modules.values()}))
def test_every_module_of_ours_that_is_named_is_there(ours: str) -> None:
    importlib.import_module(ours)


def run(project: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "diffmask_fast.compat", *arguments],
        capture_output=True, text=True, timeout=120, cwd=project.parent, env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip


def test_a_script_runs_as_by_itself_and_what_was_replaced_is_said(project: Path) -> None:
    done = run(project, str(project / "script.py"), "--gate", "input")
    assert done.returncode == 0, done.stderr
    assert done.stdout == "__main__ ['--gate', 'input'] True diffmask_fast.compat.gates\n"
    assert "diffmask_fast.compat: diffmask.models.gates is diffmask_fast.compat.gates" in done.stderr


def test_a_script_that_fails_fails_with_its_own_status(project: Path) -> None:
    assert run(project, str(project / "script.py"), "--fail").returncode == 3
    missing = run(project, "nothing.py")
    assert missing.returncode == 2 and "there is no such script" in missing.stderr
