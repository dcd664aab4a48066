"""Text to shards to batches: every token once, in order, whatever kills the writing."""

from __future__ import annotations

import json

import numpy as np
import pandas as pd
import pytest

from ratplus_exp.text import shards
from ratplus_exp.text.corpus import Corpus
from ratplus_exp.text.shards import Source, write_shards

EOS = 1
TEXTS = ["abc", "de fg", "h" * 40, "", "xyz", "the end"]


class Letters:
    """A tokenizer: a token a letter, with `size` entries."""

    eos_token_id = EOS

    def __init__(self, size: int = 256) -> None:
        self.size = size

    def __len__(self) -> int:
        return self.size

    def __call__(self, texts, add_special_tokens):
        assert not add_special_tokens
        return {"input_ids": [[ord(letter) for letter in text] for text in texts]}


def tokens(texts):
    """All documents one after the other, an EOS behind each that has a token."""
    return [t for text in texts if text for t in (*map(ord, text), EOS)]


def texts_in(folder, kind, files=3):
    """TEXTS as files of a kind, in order; returns the folder."""
    folder.mkdir()
    for i, part in enumerate(np.array_split(np.array(TEXTS, object), files)):
        frame, name = pd.DataFrame({"text": list(part)}), folder / f"part{i}"
        if kind == "parquet":
            frame.to_parquet(f"{name}.parquet")
        elif kind == "jsonl":
            frame.to_json(f"{name}.jsonl", orient="records", lines=True)
        else:
            for j, text in enumerate(part):
                (folder / f"part{i}-{j}.txt").write_text(text)
    return folder


def stored(folder):
    index = json.loads((folder / "index.json").read_text())
    parts = [np.fromfile(folder / s["file"], index["dtype"]) for s in index["shards"]]
    assert [len(part) for part in parts] == [s["tokens"] for s in index["shards"]]
    return np.concatenate(parts).tolist(), index


def write(path, folder, tokenizer=None, workers=0, **source):
    source = Source(str(path), **source)
    write_shards(source, tokenizer or Letters(), "letters", folder, workers)


@pytest.mark.parametrize("kind", ["parquet", "jsonl", "txt"])
@pytest.mark.parametrize("size, dtype", [(256, "uint16"), (1 << 17, "uint32")])
def test_every_token_is_stored_in_order(tmp_path, kind, size, dtype):
    write(texts_in(tmp_path / "texts", kind), tmp_path / "corpus", Letters(size))
    found, index = stored(tmp_path / "corpus")
    assert found == tokens(TEXTS) and index["dtype"] == dtype
    assert index["tokens"] == len(found)


@pytest.mark.slow
def test_several_workers_write_what_one_does(tmp_path):
    texts = texts_in(tmp_path / "texts", "jsonl")
    write(texts, tmp_path / "one")
    write(texts, tmp_path / "two", workers=2)
    assert stored(tmp_path / "one") == stored(tmp_path / "two")


@pytest.mark.parametrize("torn", [b"", b"\x07\x07\x07"], ids=["clean", "torn"])
def test_a_killed_tokenisation_goes_on_inside_a_file(tmp_path, monkeypatch, torn):
    monkeypatch.setattr(shards, "DOCUMENTS", 1)
    texts, folder = texts_in(tmp_path / "texts", "jsonl", files=2), tmp_path / "corpus"

    seen, killed = [], True

    class Watched(Letters):
        def __call__(self, texts, add_special_tokens):
            if killed and "xyz" in texts:
                raise KeyboardInterrupt
            seen.extend(texts)
            return super().__call__(texts, add_special_tokens)

    with pytest.raises(KeyboardInterrupt):
        write(texts, folder, Watched())
    assert seen
    seen.clear()
    killed = False
    assert not (folder / "index.json").exists()
    [partial] = folder.glob("*.partial")
    with partial.open("ab") as file:
        file.write(torn)
    write(texts, folder, Watched())
    assert stored(folder)[0] == tokens(TEXTS)
    assert seen == ["xyz", "the end"]  # nothing twice


def test_the_wanted_number_of_tokens_is_kept(tmp_path, monkeypatch):
    monkeypatch.setattr(shards, "DOCUMENTS", 1)
    write(texts_in(tmp_path / "texts", "jsonl"), tmp_path / "corpus", tokens=7)
    corpus = Corpus(tmp_path / "corpus", "letters")
    assert corpus.tokens == 7
    ids, labels = corpus.batch(0, 0, 1, 6)
    assert [*ids[0], labels[0, -1]] == tokens(TEXTS)[:7]


@pytest.mark.parametrize(
    "change, message",
    [
        ({"field": "body"}, "no field 'body': set corpus.field to one of text"),
        ({"path": "empty"}, "holds no files"),
        ({"path": "no/such/dataset"}, "cannot open the data set no/such/dataset"),
    ],
)
def test_sources_that_cannot_be_read(tmp_path, change, message):
    (tmp_path / "empty").mkdir()
    path = change.pop("path", None)
    if path is None:
        path = texts_in(tmp_path / "texts", "jsonl")
    elif path == "empty":
        path = tmp_path / "empty"
    with pytest.raises(ValueError, match=message):
        write(path, tmp_path / "corpus", **change)


@pytest.mark.parametrize("wrong", [{"field": "body"}, {"path": "nowhere"}, {"field": "empty"}])
def test_a_first_try_that_failed_does_not_claim_the_folder(tmp_path, wrong):
    texts = tmp_path / "texts"
    texts.mkdir()
    lines = [json.dumps({"text": text, "empty": ""}) for text in TEXTS]
    (texts / "a.jsonl").write_text("\n".join(lines) + "\n")
    with pytest.raises(ValueError, match="no field|cannot open|has no text"):
        write(**{"path": texts, "folder": tmp_path / "corpus"} | wrong)
    write(texts, tmp_path / "corpus")
    assert stored(tmp_path / "corpus")[0] == tokens(TEXTS)


def test_a_folder_keeps_to_its_source(tmp_path):
    texts = texts_in(tmp_path / "texts", "jsonl")
    write(texts, tmp_path / "corpus")
    with pytest.raises(ValueError, match="another tokens: set corpus.folder"):
        write(texts, tmp_path / "corpus", tokens=5)
    with pytest.raises(ValueError, match="another tokenizer"):
        Corpus(tmp_path / "corpus", "other")
    shard = next((tmp_path / "corpus").glob("*.bin"))
    shard.write_bytes(shard.read_bytes()[:-2])
    with pytest.raises(ValueError, match=r"is not \d+ tokens long"):
        Corpus(tmp_path / "corpus", "letters")
    with pytest.raises(ValueError, match="run stage=tokenize"):
        Corpus(tmp_path, "letters")
    for damaged in ('{"tok', "{}", "[]"):
        (tmp_path / "corpus" / "index.json").write_text(damaged)
        with pytest.raises(ValueError, match=r"index\.json is damaged: delete"):
            Corpus(tmp_path / "corpus", "letters")


def make_corpus(folder, parts):
    """A corpus of the numbers 0, 1, 2, … in shards of given lengths."""
    folder.mkdir()
    ids = np.arange(sum(parts), dtype=np.uint16)
    names = [f"{i}.bin" for i in range(len(parts))]
    for name, part in zip(names, np.split(ids, np.cumsum(parts)[:-1]), strict=True):
        part.tofile(folder / name)
    listed = [{"file": n, "tokens": k} for n, k in zip(names, parts, strict=True)]
    index = {"dtype": "uint16", "tokenizer": "t", "tokens": len(ids), "shards": listed}
    (folder / "index.json").write_text(json.dumps(index))
    return Corpus(folder, "t")


def test_a_pass_sees_every_window_once_shuffled_and_across_shards(tmp_path):
    corpus = make_corpus(tmp_path / "corpus", [7, 0, 1, 25])  # 33 tokens: 8 windows of 4
    assert corpus.windows(4) == 8
    steps = [corpus.batch(3, step, 2, 4) for step in range(8)]
    for ids, labels in steps:
        assert np.array_equal(ids + 1, labels)  # the numbers run on, also into the next window
        assert ids.shape == (2, 4) and ids.dtype == np.int64
    starts = [int(row[0]) for ids, _ in steps for row in ids]
    first, second = starts[:8], starts[8:]
    assert sorted(first) == sorted(second) == list(range(0, 32, 4))
    assert first != second and first != sorted(first)


def test_batches_depend_on_seed_and_step_alone(tmp_path):
    corpus = make_corpus(tmp_path / "a", [40])
    again = make_corpus(tmp_path / "b", [40])
    for step in (5, 0, 3):
        assert np.array_equal(corpus.batch(0, step, 3, 4), again.batch(0, step, 3, 4))
    assert not np.array_equal(corpus.batch(0, 0, 3, 4), corpus.batch(1, 0, 3, 4))
    assert corpus.id == again.id != make_corpus(tmp_path / "c", [41]).id
    with pytest.raises(ValueError, match="fewer than a context of 40"):
        corpus.check(40)


@pytest.mark.parametrize(
    ("kind", "content"), [("jsonl", b"{not json\n"), ("txt", b"\xff\xfe\x00"), ("parquet", b"x")]
)
def test_a_damaged_file_is_named(tmp_path, monkeypatch, kind, content):
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    folder = texts_in(tmp_path / "texts", kind)
    last = sorted(folder.iterdir())[-1]
    last.write_bytes(content)
    with pytest.raises(ValueError, match=rf"{last.name} cannot be used .*repair or remove it"):
        write_shards(Source(str(folder)), Letters(), "letters", tmp_path / "tokens", 0)
