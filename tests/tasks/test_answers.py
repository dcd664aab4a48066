"""Fine-tuning on prompts, with documents of pretraining replayed between them."""

import numpy as np

from ratplus_exp.tasks import pocket_tokenizer
from ratplus_exp.tasks.source import Ruler
from ratplus_exp.text.answers import Answers
from ratplus_exp.text.facts import Facts


def test_replayed_batches_are_new_documents_and_the_others_are_the_same_prompts(pocket_forms):
    tokenizer = pocket_tokenizer(pocket_forms)
    documents = Facts(tokenizer, pocket_forms)
    source, mixture = Ruler(tokenizer, 512, pocket_forms), {"S-2": 1, "MV": 2}
    prompts = Answers(source, mixture)
    mixed = Answers(source, mixture, documents=documents, replay=0.5)
    replayed = 0
    for step in range(20):
        ids, labels = mixed.batch(0, step, 2, 256)
        if np.array_equal(ids, prompts.batch(0, step, 2, 256)[0]):
            assert (labels >= 0).sum() < 100  # the answers
            continue
        replayed += 1
        assert (labels >= 0).sum() > 100
        assert np.array_equal(ids, mixed.batch(0, step, 2, 256)[0])
        assert not np.array_equal(ids, documents.batch(0, step, 2, 256)[0])  # of pretraining
    assert 4 <= replayed <= 16
