"""The random cases together cover what they are meant to."""

from __future__ import annotations

from imex_persist.abi import MAX_SPLITS

from .cases import CASES, EXCHANGES, NUM_CASES, exchange_of


def test_every_case_can_be_planned():
    for case in CASES:
        assert case.shape()["ring_stages"] >= 4
        assert case.num_rows <= case.options["max_rows"]


def test_the_cases_cover():
    configs = [case.config for case in CASES]
    assert NUM_CASES >= 20
    assert {case.options["world_size"] for case in CASES} == {1, 2, 3, 4}
    assert {case.num_rows for case in CASES} >= {1, 2, 3, 4, 5, 6, 7}
    assert {case.options["max_rows"] for case in CASES} >= {*range(1, 9), 16}
    assert {c.num_attention_heads // c.num_key_value_heads for c in configs} == {*range(1, 9), 20}
    assert {c.head_dim for c in configs} >= {32, 40, 64, 80, 100, 128}
    assert {c.num_hidden_layers for c in configs} == {1, 2, 3}
    assert {case.options["down_slices"] for case in CASES} == {1, 2, 4}
    assert {case.num_blocks for case in CASES} >= {1, 2, 4, 8}
    assert {c.rope_scaling.rope_type for c in configs} == {"default", "linear", "llama3"}
    assert {c.tie_word_embeddings for c in configs} == {False, True}
    assert all(c.intermediate_size % 2 for c in configs)
    assert sum(c.hidden_size % 32 != 0 for c in configs) > 15
    assert sum(c.vocab_size % 8 != 0 for c in configs) > 15
    assert sum(c.num_key_value_heads % case.options["world_size"] != 0 for c, case in zip(configs, CASES, strict=True)) > 3
    for strategy in EXCHANGES:
        assert len({case.options["world_size"] for case in CASES if exchange_of(case) == strategy}) >= 3


def test_the_cases_cover_the_contexts():
    chunks = [(case, chunk) for case in CASES for chunk in case.chunks]
    assert any(len(case.chunks) >= 3 for case in CASES)
    assert any(chunk.count > 1 and chunk.start == 0 for _, chunk in chunks)
    assert any(chunk.start == 0 and chunk.count == 1 for _, chunk in chunks)
    across = [case for case, c in chunks if c.start // case.page_size < (c.start + c.count - 1) // case.page_size]
    assert len(across) >= 3, "chunks that begin a page in the step"
    assert any(c.start % case.page_size == 0 and c.start for case, c in chunks), "a chunk that starts a page"
    assert any(c.start < 256 <= c.start + c.count - 1 for _, c in chunks), "rows of one chunk on both sides of the first cut"
    long = [case for case, c in chunks if c.start + c.count > 256 and 1 < case.shape()["max_splits"] <= MAX_SPLITS]
    assert len(long) >= 6, "contexts cut into runs"
    assert any(c.samples for _, c in chunks)
    assert any(not c.samples for _, c in chunks)
    assert {case.page_size for case in CASES} == {32, 64, 128}
