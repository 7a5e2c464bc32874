"""The original predictions, computed once: a memory-mapped file, keyed by example, that a training fills as it goes.

The frozen model's prediction on a whole text never changes. Who knows it needs no pass through the layers above the
deepest site that the probe looks at.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import os
import zlib
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from diffmask_fast.data import Examples
from diffmask_fast.predictions import PADDING, Kind, Tables, kind_of
from diffmask_fast.runs import versions
from diffmask_fast.sites import Patched

_FORMAT = 1
LARGEST = 8e9  # bytes; the words of a language model are many at each place


class RememberedPredictions:
    """The tables of N examples' predictions in one file, `predictions-<fingerprint>.bin`.

    A row counts as known when its checksum is right, so what was torn by a crash or damaged later is computed again.
    Processes of one machine may share the file: each writes what it computed, and the checksum last. The file is made
    in its full size, `nbytes`, at once: a full disk is an error at the start and not in the middle. Files of another
    fingerprint in the folder are of another model or other texts, and are removed.

    Args:
        folder: where the file is, or will be.
        fingerprint: of the model and the texts, see the function of that name.
        sizes: per example, how many numbers each of its tables holds; the same number of tables for all.
        dtype: of the tables.
        classes: C of tables (B, P, C); None where tables are (B, C).

    Raises:
        OSError: there is no room for the file.
    """

    def __init__(
        self,
        folder: str | os.PathLike[str],
        fingerprint: str,
        sizes: Sequence[tuple[int, ...]],
        dtype: torch.dtype = torch.float32,
        classes: int | None = None,
    ) -> None:
        self.sizes = list(sizes)
        self.classes = classes
        ends = torch.tensor([0, *(sum(row) for row in sizes)]).cumsum(0).tolist()
        self._rows = [slice(start, end) for start, end in itertools.pairwise(ends)]
        checksums = 8 * len(self.sizes)
        self.nbytes = checksums + ends[-1] * dtype.itemsize
        self.path = Path(folder) / f"predictions-{fingerprint}.bin"
        for other in Path(folder).glob("predictions-*.bin"):
            if other != self.path or other.stat().st_size != self.nbytes:
                other.unlink(missing_ok=True)
        self._reserve()
        file = torch.from_file(str(self.path), shared=True, size=self.nbytes, dtype=torch.uint8)
        self._checksums, self._values = file[:checksums].view(torch.int64), file[checksums:].view(dtype)

    def _reserve(self) -> None:
        Path(self.path.parent).mkdir(parents=True, exist_ok=True)
        descriptor = os.open(self.path, os.O_RDWR | os.O_CREAT, 0o644)
        try:
            if hasattr(os, "posix_fallocate"):  # writing to a map that the disk has no room for would be fatal
                os.posix_fallocate(descriptor, 0, self.nbytes)
            else:  # macOS
                os.ftruncate(descriptor, self.nbytes)
        except OSError as error:
            self.path.unlink(missing_ok=True)
            raise OSError(
                error.errno, f"no room for {self.nbytes / 1e6:.0f} MB of predictions ({error.strerror})", str(self.path)
            ) from error
        finally:
            os.close(descriptor)

    def get(self, examples: Sequence[int]) -> Tables | None:
        """The tables of these examples, padded to the longest of them, or None if one is not known."""
        rows = [self._values[self._rows[i]] for i in examples]
        if any(_checksum(row) != self._checksums[i].item() for row, i in zip(rows, examples, strict=True)):
            return None
        tables = zip(*(row.split(self.sizes[i]) for row, i in zip(rows, examples, strict=True)), strict=True)
        padded = (torch.nn.utils.rnn.pad_sequence(list(t), batch_first=True, padding_value=PADDING) for t in tables)
        return tuple(table if self.classes is None else table.unflatten(1, (-1, self.classes)) for table in padded)

    def put(self, examples: Sequence[int], tables: Tables) -> None:
        """Remember the tables of these examples."""
        on_cpu = [table.detach().flatten(1).cpu() for table in tables]
        for row, i in enumerate(examples):
            parts = [table[row, :size] for table, size in zip(on_cpu, self.sizes[i], strict=True)]
            value = torch.cat(parts).to(self._values.dtype)
            self._values[self._rows[i]] = value
            self._checksums[i] = _checksum(value)


def _checksum(row: Tensor) -> int:
    return zlib.crc32(row.contiguous().numpy().data) + 1  # never the 0 of a new file


def remembered_for(
    patched: Patched, model: nn.Module, examples: Examples, folder: str | os.PathLike[str]
) -> RememberedPredictions | None:
    """The remembered predictions of a frozen model, in the dtype that it will run in, for these examples; None for a
    kind of prediction that can't be, or would take more than `LARGEST`."""
    device = next(model.parameters()).device
    inputs = {name: value.to(device) for name, value in examples.collate([examples[0]]).items()}
    with torch.no_grad():
        output = patched.run(inputs).output
    kind = examples.kind or kind_of(output)
    if type(kind).__module__ != Kind.__module__:  # nothing tells one that somebody else wrote from another like it
        return None
    tables = kind.tables(output, inputs)
    sizes = []
    for i in range(len(examples)):
        row = kind.row_sizes(tables, examples.collate([examples[i]]))
        if row is None:
            return None
        sizes.append(row)
    if sum(map(sum, sizes)) * tables[0].dtype.itemsize > LARGEST:
        return None
    classes = tables[0].shape[2] if tables[0].dim() == 3 else None
    return RememberedPredictions(folder, fingerprint(model, examples), sizes, tables[0].dtype, classes)


def fingerprint(model: nn.Module, examples: Examples) -> str:
    """16 hexadecimal digits of the model's weights and configuration, the encoded texts, the kind of prediction and the
    packages' versions."""
    digest = hashlib.blake2b(digest_size=8)
    config = getattr(model, "config", None)
    described = {
        "format": _FORMAT,
        "class": type(model).__qualname__,
        "config": config.to_dict() if config is not None else {},
        "attention": getattr(config, "_attn_implementation", None),
        "versions": versions(),
        "kind": repr(examples.kind),
    }
    digest.update(json.dumps(described, sort_keys=True, default=str).encode())
    for name, value in model.state_dict().items():
        if hasattr(value, "full_tensor"):  # of which this process has a part, see docs/sharded.md
            value = value.full_tensor()
        plain = value.detach().cpu().contiguous()
        digest.update(f"{name} {plain.dtype} {tuple(plain.shape)}".encode())
        digest.update(plain.reshape(-1).view(torch.uint8).numpy().data)
    for item in examples.inputs:
        digest.update(json.dumps({n: v for n, v in item.items() if not isinstance(v, Tensor)}, sort_keys=True).encode())
        for name, value in sorted(item.items()):
            if isinstance(value, Tensor):  # a picture
                raw = value.detach().cpu().contiguous()
                digest.update(f"{name} {raw.dtype} {tuple(raw.shape)}".encode())
                digest.update(raw.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()
