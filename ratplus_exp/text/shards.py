"""Tokenises text once: a streamed or local data set becomes flat shards for memory-mapping.

    <folder>/source.json     the source and the tokenizer
    <folder>/00000.bin ...   token ids, with an EOS after each document
    <folder>/index.json      the shards in order, with their lengths; written last

A shard holds consecutive files of the data set, so processes write shards in parallel with the same
result as one. A killed run resumes inside each shard: `.partial` has its tokens, the `.json` file
the number of valid ones.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator
from concurrent.futures import wait
from contextlib import contextmanager
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from ratplus_exp.settings import Source
from ratplus_exp.store import naming, write_atomically
from ratplus_exp.workers import Workers

BUILDERS = {".parquet": "parquet", ".jsonl": "json", ".txt": "text"}  # of the datasets package
MAX_SHARDS = 256
DOCUMENTS = 512  # tokenised and written at a time


def write_shards(source: Source, tokenizer: Any, name: str, folder: Path, workers: int) -> None:
    """Tokenise a source into a folder, resuming an earlier run.

    tokenizer: a Hugging Face tokenizer with an EOS, identified by name. workers: processes; 0: this
    one.

    Raises:
        ValueError: the source can't be opened or lacks the field, or the folder has another source.
    """
    folder.mkdir(parents=True, exist_ok=True)
    _claim(folder, asdict(source) | {"tokenizer": name})
    if (folder / "index.json").exists():
        return
    count = min(_open(source).num_shards, MAX_SHARDS)
    dtype = np.dtype("uint16" if len(tokenizer) <= 1 << 16 else "uint32")
    write = partial(_write_shard, source, tokenizer, folder, count, dtype)
    lengths: list[int] = []
    with tqdm(total=source.tokens, unit="token", unit_scale=True, desc="tokenising") as bar:

        def progress() -> None:
            bar.update(_bytes_written(folder) // dtype.itemsize - bar.n)

        for length in _in_order(write, count, workers, progress):
            lengths.append(length)
            if source.tokens and sum(lengths) >= source.tokens:
                break
        progress()
    if not (total := sum(lengths)):
        raise ValueError(f"{source.path} has no text: check corpus.path and corpus.field")
    index = {
        "dtype": dtype.name,
        "vocabulary": len(tokenizer),
        "tokenizer": name,
        "tokens": min(total, source.tokens or total),
        "shards": [{"file": _name(i), "tokens": n} for i, n in enumerate(lengths)],
    }
    _write(folder / "index.json", index)


def _in_order(
    write: Callable[[int], int], count: int, workers: int, progress: Callable[[], None]
) -> Iterator[int]:
    """The results of write(0) … write(count - 1); `progress` is called every second."""
    if not workers:
        yield from map(write, range(count))
        return
    with Workers(workers) as pool:
        for job in [pool.submit(write, i) for i in range(count)]:
            while not wait([job], timeout=1).done:
                progress()
            yield job.result()


def _write_shard(
    source: Source, tokenizer: Any, folder: Path, count: int, dtype: np.dtype[Any], index: int
) -> int:
    """Write one of `count` shards, and return its number of tokens. It ends with the batch that
    reaches source.tokens."""
    target = folder / _name(index)
    if target.exists():
        return target.stat().st_size // dtype.itemsize
    partial, note = target.with_suffix(".partial"), target.with_suffix(".json")
    done = json.loads(note.read_text()) if note.exists() else {"documents": 0, "tokens": 0}
    stream = _open(source).shard(count, index).skip(done["documents"])
    mode = "r+b" if done["documents"] else "wb"
    with _name_file(source, count, index), naming(partial), partial.open(mode) as file:
        file.truncate(done["tokens"] * dtype.itemsize)  # drop what follows the last note
        file.seek(0, os.SEEK_END)
        for batch in stream.iter(batch_size=DOCUMENTS):
            if source.tokens and done["tokens"] >= source.tokens:
                break
            if source.field not in batch:
                raise ValueError(
                    f"{source.path} has no field {source.field!r}: set corpus.field to one of "
                    f"{', '.join(batch)}"
                )
            texts = [text for text in batch[source.field] if text]
            rows = tokenizer(texts, add_special_tokens=False)["input_ids"] if texts else []
            ids = np.array([x for row in rows for x in (*row, tokenizer.eos_token_id)], dtype)
            file.write(ids.tobytes())
            file.flush()
            os.fsync(file.fileno())
            done["documents"] += len(batch[source.field])
            done["tokens"] += len(ids)
            _write(note, done)
    os.replace(partial, target)
    note.unlink(missing_ok=True)
    return done["tokens"]


@contextmanager
def _name_file(source: Source, count: int, index: int) -> Iterator[None]:
    """Errors name the file of a shard, or the data set if the shard has several files."""
    try:
        yield
    except (ValueError, TypeError) as error:  # datasets and tokenizers name no file
        files = _files(source)
        where = files[index] if len(files) == count else source.path
        text = " ".join(str(error).split())[:200]
        raise ValueError(f"{where} cannot be used ({text}): repair or remove it") from None


def _files(source: Source) -> list[Path]:
    """The files of a folder, all of one kind; none for a data set on the hub."""
    path = Path(source.path).expanduser()
    if not path.is_dir():
        return []
    files = {kind: x for kind in BUILDERS if (x := sorted(path.rglob(f"*{kind}")))}
    if len(files) != 1:
        raise ValueError(
            f"{path} holds {' and '.join(files) or 'no'} files: corpus.path must be a folder of "
            f"one kind of {', '.join(BUILDERS)}"
        )
    return next(iter(files.values()))


def _open(source: Source) -> Any:
    """The source as a datasets.IterableDataset."""
    import datasets  # takes seconds

    if files := _files(source):
        kind, names = files[0].suffix, [str(file) for file in files]
        options = {"sample_by": "document"} if kind == ".txt" else {}
        return datasets.load_dataset(
            BUILDERS[kind], data_files=names, split="train", streaming=True, **options
        )
    try:
        return datasets.load_dataset(source.path, source.subset, split=source.split, streaming=True)
    except Exception as error:  # of the hub, the network or datasets: of many types
        text = " ".join(str(error).split())[:160]
        raise ValueError(
            f"cannot open the data set {source.path} ({type(error).__name__}: {text}): check "
            "corpus.path and the network, or set corpus.path to a folder"
        ) from None


def _claim(folder: Path, origin: dict[str, Any]) -> None:
    """A folder with tokens is for one source and one tokenizer."""
    file = folder / "source.json"
    before = json.loads(file.read_text()) if file.exists() else origin
    if before != origin and _bytes_written(folder):
        changed = ", ".join(key for key in origin if origin[key] != before.get(key))
        raise ValueError(
            f"{folder} holds a corpus with another {changed}: set corpus.folder, or delete it"
        )
    if before != origin:  # a run that wrote no token
        for path in folder.glob("*.*"):  # all but the lock
            path.unlink()
    _write(file, origin)


def _bytes_written(folder: Path) -> int:
    """Bytes of all shards, finished or not."""
    files = [*folder.glob("*.bin"), *folder.glob("*.partial")]
    return sum(file.stat().st_size for file in files if file.exists())


def _name(index: int) -> str:
    return f"{index:05d}.bin"


def _write(path: Path, content: dict[str, Any]) -> None:
    write_atomically(path, json.dumps(content, indent=1) + "\n")
