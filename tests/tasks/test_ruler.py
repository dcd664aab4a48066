"""RULER's JSONL: samples are read back, and a bad line is named."""

import json

import pytest
from ruler_file import write_jsonl

from ratplus_exp.tasks import RULER_NAMES, Ruler, read_jsonl

LINE = {
    "index": 0,
    "input": "One of the special magic numbers for big-cat is: 1234567.\nWhat is it, 1234567?",
    "outputs": ["1234567"],
    "length": 150,
    "length_w_model_temp": 150,
    "answer_prefix": " The special magic number is",
    "token_position_answer": 9,
}


def written(path, *lines):
    path.write_text("".join(f"{line}\n" for line in lines))
    return path


def test_round_trip(bpe, tmp_path):
    niah, path = Ruler(bpe, 1024), tmp_path / "validation.jsonl"
    samples = [niah.sample("MV", 0, index) for index in range(3)]
    write_jsonl(samples, path)
    read = read_jsonl(path, bpe, 1024, "MV")
    assert [sample.id for sample in read] == [f"MV/validation/ruler/{i}" for i in range(3)]
    for old, new in zip(samples, read, strict=True):
        assert {**vars(old), "id": None} == {**vars(new), "id": None}


def test_all_spans_of_a_value_are_found(bpe, tmp_path):
    (sample,) = read_jsonl(written(tmp_path / "x.jsonl", json.dumps(LINE)), bpe, 512, "S-1")
    assert sample.prompt == LINE["input"] + LINE["answer_prefix"]
    spans = sample.gold_spans["1234567"]
    assert [bpe.decode(sample.input_ids[a:b]).strip() for a, b in spans] == ["1234567"] * 2


@pytest.mark.parametrize("task", [name for name in RULER_NAMES if name not in ("S-1", "MV")])
def test_files_of_all_tasks_are_read(bpe, tmp_path, task):
    """Those of qa may have answers that stand nowhere, any of which will do."""
    line = {k: v for k, v in LINE.items() if k != "token_position_answer"}
    if task.startswith("qa"):
        line |= {"outputs": ["yes", "so it is"]}
    (sample,) = read_jsonl(written(tmp_path / "x.jsonl", json.dumps(line)), bpe, 512, task)
    assert sample.one_of == task.startswith("qa") and list(sample.answers) == line["outputs"]
    assert bool(sample.gold_spans) == (task not in ("cwe", "fwe", "qa_1", "qa_2"))


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", "Invalid JSON"),
        ("", "Invalid JSON"),
        ("[1]", "should be an object"),
        *[
            (json.dumps({k: v for k, v in LINE.items() if k != name}), f"'{name}': Field required")
            for name in LINE
            if name != "token_position_answer"  # of needles alone
        ],
        (json.dumps(LINE | {"input": 3}), "'input': Input should be a valid string"),
        (json.dumps(LINE | {"outputs": []}), "'outputs': "),
        (json.dumps(LINE | {"outputs": [7]}), "'outputs': "),
        (json.dumps(LINE | {"outputs": ["7654321"]}), "does not contain the answer '7654321'"),
        (json.dumps(LINE | {"input": "", "answer_prefix": ""}), "does not contain the answer"),
    ],
)
def test_bad_line_is_named(bpe, tmp_path, line, message):
    path = written(tmp_path / "x.jsonl", json.dumps(LINE), line, json.dumps(LINE))
    with pytest.raises(ValueError, match=message) as error:
        read_jsonl(path, bpe, 512, "S-1")
    assert str(error.value).startswith(f"{path}, line 2: ")


def test_long_prompt_is_refused_not_truncated(bpe, tmp_path):
    path = written(tmp_path / "x.jsonl", json.dumps(LINE))
    with pytest.raises(ValueError, match=r"line 1: S-1/x/ruler/0: the prompt has \d+ tokens"):
        read_jsonl(path, bpe, 20, "S-1")
    endless = json.dumps(LINE | {"input": LINE["input"] * 100_000})
    with pytest.raises(ValueError, match="line 1: the prompt has .* characters, too many"):
        read_jsonl(written(path, endless), None, 512, "S-1")  # no tokenizer takes part


def test_absent_file(bpe, tmp_path):
    with pytest.raises(ValueError, match="cannot be read"):
        read_jsonl(tmp_path / "absent.jsonl", bpe, 512, "S-1")
