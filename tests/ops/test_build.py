from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]


def test_without_a_compiler_the_build_succeeds_and_says_what_was_left_out(tmp_path):
    command = [sys.executable, "setup.py", "build_ext", f"--build-lib={tmp_path}", f"--build-temp={tmp_path}"]
    environment = os.environ | {"CXX": "no-such-compiler"}
    result = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert "diffmask_fast: built without the C++ library: no C++ compiler" in result.stderr
    assert not list(tmp_path.rglob("*.so"))
