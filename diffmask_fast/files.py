"""Writing a file so that a reader sees the old one or the whole new one, never half of it."""

from __future__ import annotations

import os
import secrets
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def replacing(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Give a temporary path beside `path` to write to; move it over `path` when the block ends well.

    The temporary name ends as `path` does, because some writers choose the format by the ending. If the block
    raises, the temporary file is removed and `path` is as it was.

    Raises:
        FileNotFoundError: the folder of `path` does not exist.
        IsADirectoryError: `path` is a folder.
    """
    target = Path(path)
    if not target.parent.is_dir():
        raise FileNotFoundError(f"cannot write {target}: the folder {target.parent} does not exist; create it first")
    if target.is_dir():
        raise IsADirectoryError(f"cannot write {target}: it is a folder; give the name of a file")
    temporary = target.with_name(f".{secrets.token_hex(6)}.{target.name[-100:]}")
    try:
        temporary.touch()
        mode = temporary.stat().st_mode  # as the user's files have it: safetensors lets nobody else read its own
        temporary.unlink()
        yield temporary
        temporary.chmod(mode)
        os.replace(temporary, target)
    finally:
        temporary.unlink(missing_ok=True)
