"""Golden positions: each token of the answer is found where the prompt says it."""

import pytest

from ratplus_exp.tasks import TASKS, Forms, Ruler
from ratplus_exp.tasks.sample import golden_answer, make_sample, target_ids


@pytest.mark.parametrize("task", TASKS)
def test_pocket_tokens_stand_where_their_values_stand(task, pocket, pocket_forms):
    sample = Ruler(pocket, 256, pocket_forms).sample(task, 0, 3)
    answer = golden_answer(sample, pocket)
    assert answer.ids == target_ids(sample, pocket)
    assert answer.positions[-1] == frozenset() and answer.values[-1] == -1
    for token, positions, value in zip(answer.ids, answer.positions, answer.values, strict=True):
        if value >= 0:
            spans = sample.gold_spans[sample.answers[value]]
            assert len(positions) == len(spans)
            assert all(any(start <= p < end for start, end in spans) for p in positions)
            assert {sample.input_ids[p] for p in positions} == {token}
    for fed in (0, 1):  # the first token has a step of its own only if a token is fed to it
        steps = list(answer.steps(fed))
        assert [token for token, *_ in steps] == list(range(1 - fed, len(answer.ids) - 1))
        assert all(set(answer.positions[a]) == {*p} and answer.values[a] == v for a, p, v in steps)
    said = [v for v in answer.values if v >= 0]
    assert said == sorted(said) and set(said) == set(range(len(sample.answers)))


def test_every_occurrence_counts_and_each_value_has_its_own(pocket):
    prompt = "otter 4815. the grass is green. badger 9034. otter 4815. what is badger, otter"
    sample = make_sample("x", "MQ", prompt, ["9034", "4815"], pocket)
    answer = golden_answer(sample, pocket)
    places = {
        value: [p for p, v in zip(answer.positions, answer.values, strict=True) if v == value]
        for value in (0, 1)
    }
    assert all(len(p) == 1 for p in places[0]) and all(len(p) == 2 for p in places[1])
    assert [sorted(p) for p in places[1]] == [
        list(x) for x in zip(*(range(a, b) for a, b in sample.gold_spans["4815"]), strict=True)
    ]


def test_values_that_are_cut_otherwise_are_matched_by_characters(bpe):
    """Behind a space a BPE cuts a value into other tokens than behind a bracket."""
    sample = make_sample("x", "S-3", "It is (one-some-the-1234567).", ["one-some-the-1234567"], bpe)
    answer = golden_answer(sample, bpe)
    encoded = bpe(sample.prompt, return_offsets_mapping=True, add_special_tokens=False)
    begin, said = sample.prompt.index("one-"), 0
    for token, positions, value in zip(answer.ids, answer.positions, answer.values, strict=True):
        if value < 0:
            continue
        (position,) = positions
        start, end = encoded.offset_mapping[position]
        assert start <= begin + said < end
        said += len(bpe.decode([token]).strip())
    assert said == len("one-some-the-1234567")


def test_rulers_prompts(bpe):
    sample = Ruler(bpe, 1024, Forms()).sample("MV", 0, 0)
    answer = golden_answer(sample, bpe)
    assert set(answer.values) == {-1, 0, 1, 2, 3}
    assert all(bool(p) == (v >= 0) for p, v in zip(answer.positions, answer.values, strict=True))
