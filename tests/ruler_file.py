"""Samples in a file of RULER's format."""

import json


def write_jsonl(samples, path, reserve=128):
    """reserve: RULER's tokens_to_generate, part of `length`."""
    with open(path, "w", encoding="utf-8") as file:
        for index, sample in enumerate(samples):
            record = {
                "index": index,
                "input": sample.prompt,
                "outputs": list(sample.answers),
                "length": sample.length + reserve,
                "length_w_model_temp": sample.length + reserve,
                "answer_prefix": "",
            }
            file.write(json.dumps(record) + "\n")
