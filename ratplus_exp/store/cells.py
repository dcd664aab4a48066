"""Append-only results: one folder per cell, safe against a kill at any moment.

    <root>/<stage>/<readable name>-<hash of the key>/
        config.json     the key, and one provenance entry for each time the cell was opened
        samples.jsonl   one line per sample, on disk before `append` returns
        samples.3.jsonl the same, from rank 3 of several processes; rank 0 writes samples.jsonl
        metrics.json    computed from all of these lines
        done            {"n": number of lines that metrics.json covers}
        lock            names the writing process (rank 0 of several)

Files are written in this order, so `done` implies the rest. The number of samples is not part of
the key: a later run can extend the cell. Samples are identified by id, in whichever file.

A file that an interrupted write cannot produce, such as an empty one, is damaged. Its cell counts
as missing, with a warning. The next run recomputes a damaged metrics.json or done. If another file
is damaged, it renames the folder to <folder>.damaged1 and starts again.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import re
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from io import FileIO
from itertools import count
from pathlib import Path
from typing import Any, NamedTuple

from ratplus_exp.store.files import locked, naming, sync, warn, write_atomically

FORMAT = 2
"""Part of every hash. Increase it when the numbers of a key change."""
DAMAGED = ".damaged"  # in the name of folders that are ignored


class Store:
    """All cells under one folder. The constructor writes nothing."""

    def __init__(self, root: str | Path) -> None:
        self.root = Path(root)

    def cell(self, key: dict[str, Any]) -> Cell:
        """The cell of a key, whether it exists or not; writes nothing."""
        return Cell(self.root, key)

    def cells(self, stage: str = "*") -> Iterator[Cell]:
        """All cells, finished or not, sorted by name. A cell whose config.json is damaged or does
        not match its folder is left out with a warning."""
        for path in sorted(self.root.glob(f"{stage}/*/config.json")):
            if DAMAGED in path.parent.name:
                continue
            try:
                config = _read_json(path)
                if config["format"] != FORMAT:
                    continue
                cell = self.cell(config["key"])
            except (ValueError, KeyError, TypeError):
                cell = None
            if cell is None or cell.path != path.parent:
                _warn_missing(f"{path} is not the configuration of this folder's cell")
            else:
                yield cell


class Finished(NamedTuple):
    """A finished cell with what its files have, each read once."""

    cell: Cell
    metrics: dict[str, Any]
    provenance: list[dict[str, Any]]
    records: dict[Any, dict[str, Any]]


class Cell:
    """One measurement: its key, its folder, its samples and metrics.

    root: the store's folder.
    key: everything that affects the numbers, and nothing else (no n, no paths, no dates), as plain
        JSON (otherwise ValueError or TypeError). "stage" is required; model, method, budget, task,
        training and seed name the folder. 1, 1.0 and true are different values. The attribute has
        lists instead of tuples.
    id: 16 hex digits, the hash of FORMAT and key.
    path: the cell's folder.
    """

    def __init__(self, root: Path, key: dict[str, Any]) -> None:
        canonical = _canonical(key)
        self.key: dict[str, Any] = json.loads(canonical)
        self.id = hashlib.sha256(f"{FORMAT}:{canonical}".encode()).hexdigest()[:16]
        self.path = root / _file_name(key["stage"]) / f"{_readable_name(self.key)}{self.id}"
        self._ids: set[Any] = set()
        self._file: FileIO | None = None  # a file of samples while open for writing

    @contextmanager
    def open(self, provenance: dict[str, Any]) -> Iterator[Cell]:
        """Open the cell for writing: lock it, add provenance, repair an interrupted write.

        provenance: plain JSON: config, commit, versions, command, date; it is stored with
        "from_sample", the number of earlier samples.

        Raises StoreBusy if another process has locked the cell, OSError if the folder can't be
        written or locked.
        """
        assert self._file is None, "the cell is already open"
        with ExitStack() as stack:
            stack.enter_context(locked(self.path))
            try:
                entries, before = self.provenance(), len(self._samples())
            except ValueError:
                aside = (self.path.with_name(f"{self.path.name}{DAMAGED}{i}") for i in count(1))
                self.path.rename(next(path for path in aside if not path.exists()))
                stack.enter_context(locked(self.path))
                entries, before = [], 0
            entries = [*entries, {**provenance, "from_sample": before}]
            config = {"format": FORMAT, "key": self.key, "provenance": entries}
            self._write_json("config.json", config)
            stack.enter_context(self._appending(self.path / "samples.jsonl"))
            yield self

    @contextmanager
    def open_share(self, rank: int) -> Iterator[Cell]:
        """Open the cell for the samples of another rank than 0, which opens and finishes it."""
        assert self._file is None and rank > 0, "rank 0 opens the cell itself"
        with self._appending(self.path / f"samples.{rank}.jsonl"):
            yield self

    @contextmanager
    def _appending(self, path: Path) -> Iterator[None]:
        self._ids = set(self.records())
        size = _read_samples(path)[1]
        try:
            with FileIO(path, "ab") as self._file:
                self._file.truncate(size)  # remove an incomplete last line
                sync(self.path)
                yield
        finally:
            self._file = None

    def append(self, records: list[dict[str, Any]]) -> None:
        """Add samples, each a plain JSON dict with a new "id" (str or int); on disk on return. The
        cell is not done until `finish`."""
        assert self._file is not None, "append needs an open cell"
        ids = {record["id"] for record in records}
        assert len(ids) == len(records) and not ids & self._ids, "a sample was appended twice"
        lines = [json.dumps(record, allow_nan=False) + "\n" for record in records]
        rest = memoryview("".join(lines).encode())
        if not rest:
            return
        if (done := self.path / "done").exists():
            done.unlink(missing_ok=True)  # by another rank
            sync(self.path)
        with naming(self.path):
            while rest:
                rest = rest[self._file.write(rest) :]
            os.fsync(self._file.fileno())
        self._ids |= ids

    def finish(self, metrics: dict[str, Any]) -> None:
        """Write the metrics of all samples and "n", NaN as null, then the marker `done`."""
        assert self._file is not None, "finish needs an open cell"
        n = len(self.records())
        assert metrics.get("n", n) == n, f"metrics of {metrics['n']} samples, but {n} are stored"
        finite = {
            name: None if isinstance(value, float) and not math.isfinite(value) else value
            for name, value in metrics.items()
        }
        self._write_json("metrics.json", {**finite, "n": n})
        self._write_json("done", {"n": n})

    def records(self) -> dict[Any, dict[str, Any]]:
        """Complete samples by id, in the order of writing; needs no lock. Empty, with a warning, if
        the cell is damaged."""
        try:
            self.provenance()
            return self._samples()
        except ValueError as error:
            _warn_missing(str(error))
            return {}

    def metrics(self) -> dict[str, Any]:
        """The metrics of `finish`, with n; empty before that."""
        return _read_json(self.path / "metrics.json")

    def provenance(self) -> list[dict[str, Any]]:
        """One entry for each opening of the cell, oldest first; ValueError if config.json is
        damaged."""
        config = _read_json(self.path / "config.json")
        past = config.get("provenance", [])
        entries = isinstance(past, list) and past and all(isinstance(x, dict) for x in past)
        if config and not (entries and _canonical(config.get("key")) == _canonical(self.key)):
            raise ValueError(f"{self.path / 'config.json'} is not the configuration of this cell")
        return past

    def done(self) -> int:
        """Number of samples that the metrics cover; 0 if the cell isn't done or is damaged."""
        read = self.finished()
        return len(read.records) if read else 0

    def finished(self) -> Finished | None:
        """The cell as it is; None if it isn't done or, with a warning, if it is damaged."""
        try:
            n = _read_json(self.path / "done").get("n", 0)
            read = Finished(self, self.metrics(), self.provenance(), self._samples()) if n else None
            if read and not n == read.metrics.get("n") == len(read.records):
                raise ValueError(f"{self.path / 'done'} contradicts the samples or metrics.json")
            return read
        except ValueError as error:
            _warn_missing(str(error))
            return None

    def _samples(self) -> dict[Any, dict[str, Any]]:
        """Complete samples by id; ValueError, naming the file, if one is damaged."""
        samples: dict[Any, dict[str, Any]] = {}
        for path in sorted(self.path.glob("samples*.jsonl")):
            samples = _read_samples(path)[0] | samples
        return samples

    def _write_json(self, name: str, content: dict[str, Any]) -> None:
        text = json.dumps(content, indent=2, allow_nan=False) + "\n"
        write_atomically(self.path / name, text)


def _read_json(path: Path) -> dict[str, Any]:
    """A file's fields, {} if there is no file; ValueError if it is damaged."""
    try:
        content = json.loads(path.read_bytes())
    except (FileNotFoundError, NotADirectoryError):
        return {}
    except (ValueError, IsADirectoryError):  # also UnicodeDecodeError
        content = None
    if not isinstance(content, dict):
        raise ValueError(f"{path} is damaged")
    return content


def _warn_missing(problem: str) -> None:
    warn(f"{problem}: the cell counts as missing; run its job again, or delete its folder")


def _read_samples(path: Path) -> tuple[dict[Any, dict[str, Any]], int]:
    """Complete records of one file by id, and their number of bytes; ValueError for an incomplete
    line before a complete one, or a sample twice, which an interrupted write cannot produce."""
    records: dict[Any, dict[str, Any]] = {}
    size, broken = 0, 0
    if not path.exists():
        return records, size
    with path.open("rb") as lines:
        for number, line in enumerate(lines, start=1):
            record = _parse(line)
            if record is None:
                broken = broken or number
            elif broken or record["id"] in records:
                problem = (
                    f"line {broken} is not a sample" if broken else f"{record['id']} is doubled"
                )
                raise ValueError(f"{path} is damaged: {problem}")
            else:
                records[record["id"]] = record
                size += len(line)
    return records, size


def _parse(line: bytes) -> dict[str, Any] | None:
    """One line of samples.jsonl, or None if it is incomplete."""
    if not line.endswith(b"\n"):
        return None
    try:
        record = json.loads(line)
    except ValueError:  # also UnicodeDecodeError
        return None
    return record if isinstance(record, dict) and isinstance(record.get("id"), str | int) else None


def _canonical(key: Any) -> str:
    """The JSON text of a key, independent of the order of its entries."""
    return json.dumps(key, sort_keys=True, separators=(",", ":"), allow_nan=False)


def _readable_name(key: dict[str, Any]) -> str:
    """The readable part of a folder's name."""
    parts = [key.get(name) for name in ("model", "method", "budget", "task")]
    names = [_file_name(part) for part in parts if part]
    names += [f"{name}{key[name]}" for name in ("training", "seed") if name in key]
    return "".join(f"{name}-" for name in names)


def _file_name(value: Any) -> str:
    """A short string that is valid in a file name."""
    return re.sub(r"[^A-Za-z0-9+-]+", "_", str(value))[:40]
