"""Pages: what is shared is the same tokens, what is given up is the longest unused, and every page is somewhere, once."""

from __future__ import annotations

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from imex_persist.runtime.pages import PagePool

SIZE = 4


def run(pool: PagePool, prompt, generated=(), max_tokens=4, confirmed=None):
    """A request from its begin to its end."""
    r = pool.reserve(prompt, max_tokens)
    sequence = [*prompt, *generated]
    pool.release(r, sequence[: len(sequence) - 1 if confirmed is None else confirmed])
    return r


def test_the_next_turn_begins_where_the_last_one_ended():
    pool = PagePool(16, SIZE)
    first = run(pool, [1, 2, 3, 4, 5, 6], [7, 8, 9])  # positions of eight tokens are in the pages: two whole ones
    assert first.cached_len == 0 and pool.num_kept == 2 and len(pool) == 16
    second = pool.reserve([1, 2, 3, 4, 5, 6, 7, 8, 9, 10], 4)
    assert second.cached_len == 8 and second.pages[:2] == first.pages[:2]
    assert not set(second.pages[2:]) & set(first.pages[:2])


def test_one_position_is_always_computed():
    pool = PagePool(16, SIZE)
    run(pool, list(range(8)), [8, 9])
    assert pool.reserve(list(range(8)), 1).cached_len == 4
    assert pool.reserve(list(range(9)), 1).cached_len == 8


def test_only_what_was_confirmed_is_kept():
    pool = PagePool(16, SIZE)
    run(pool, list(range(8)), confirmed=0)  # cancelled before its first token
    assert pool.num_kept == 0 and len(pool) == 16
    run(pool, list(range(8)), confirmed=7)
    assert pool.num_kept == 1


def test_equal_hashes_are_not_equal_tokens():
    """hash(-1) == hash(-2) in CPython; and a page is the same only after the same pages."""
    pool = PagePool(16, SIZE)
    run(pool, [-1, 2, 3, 4, 5, 6, 7, 8], [9])
    assert hash((-1, 2, 3, 4)) == hash((-2, 2, 3, 4))
    assert pool.reserve([-2, 2, 3, 4, 5], 1).cached_len == 0
    assert pool.reserve([5, 6, 7, 8, 9], 1).cached_len == 0
    assert pool.reserve([-1, 2, 3, 4, 5], 1).cached_len == 4


def test_running_requests_share_and_hold():
    pool = PagePool(6, SIZE)
    run(pool, list(range(8)), [8])
    a = pool.reserve([*range(8), 20], 3)
    b = pool.reserve([*range(8), 30], 3)
    assert a.pages[:2] == b.pages[:2] and a.pages[2] != b.pages[2]
    assert len(pool) == 2 and pool.num_kept == 0
    assert pool.reserve([40] * 9, 3) is None, "what is held is not given up"
    pool.release(a)
    assert pool.num_kept == 0 and len(pool) == 3
    pool.release(b)
    assert pool.num_kept == 2 and len(pool) == 6


def test_a_page_computed_twice_is_kept_once():
    pool = PagePool(8, SIZE)
    a, b = (pool.reserve([1, 2, 3, 4, 5], 3) for _ in range(2))
    for one in (a, b):
        pool.keep(one, [1, 2, 3, 4, 5])
    for one in (b, a):
        pool.release(one, [1, 2, 3, 4, 5])
    assert pool.num_kept == 1 and len(pool) == 8
    assert pool.reserve([1, 2, 3, 4, 5], 3).pages[0] == a.pages[0]


def test_the_longest_unused_goes_first_and_the_end_before_the_beginning():
    pool = PagePool(4, SIZE)
    run(pool, [1] * 8, max_tokens=1, confirmed=8)  # keeps A and, after it, A'
    run(pool, [2] * 4, max_tokens=1, confirmed=4)  # keeps B; one page is free
    run(pool, [1] * 5, max_tokens=1, confirmed=4)  # uses A: now B and A' are unused for longer, A' the longest
    assert pool.num_kept == 3

    def known(token):
        r = pool.reserve([token] * 9, 1)
        pool.release(r)
        return r.cached_len

    pool.release(pool.reserve([3] * 4, 4))  # two pages: the free one and A'
    assert pool.num_kept == 2
    pool.release(pool.reserve([3] * 8, 4))  # three: those and B
    assert pool.num_kept == 1 and [known(2), known(1)] == [0, 4]


def test_whole_prompts_share_nothing():
    pool = PagePool(8, SIZE)
    run(pool, list(range(8)), [8])
    r = pool.reserve([*range(8), 9], 3, share=False)
    assert r.cached_len == 0


class Model(RuleBasedStateMachine):
    """Random requests over two tokens, so that nearly everything is shared, against a list of what each page holds."""

    def __init__(self):
        super().__init__()
        self.pool = PagePool(10, 2)
        self.running = []
        self.contents = {}  # page -> the tokens up to its end that were last written into it

    @rule(prompt=st.lists(st.integers(0, 1), min_size=1, max_size=9), extra=st.integers(1, 6), share=st.booleans())
    def reserve(self, prompt, extra, share):
        available = len(self.pool)
        r = self.pool.reserve(prompt, extra, share=share)
        if r is None:
            assert -(-(len(prompt) + extra) // 2) > available
            return
        assert len(r.pages) == -(-(len(prompt) + extra) // 2) == len(set(r.pages))
        assert r.cached_len < len(prompt)
        for i in range(r.cached_len // 2):
            assert self.contents[r.pages[i]] == tuple(prompt[: 2 * i + 2])
        own = set(r.pages[r.cached_len // 2 :])
        for other, *_ in self.running:
            assert not own & set(other.pages), "a page of a running request was handed out"
        for page in own:
            self.contents.pop(page, None)
        self.running.append([r, list(prompt), len(prompt) + extra])

    @precondition(lambda self: self.running)
    @rule(data=st.data())
    def grow(self, data):
        r, tokens, limit = data.draw(st.sampled_from(self.running))
        tokens += data.draw(st.lists(st.integers(0, 1), max_size=limit - len(tokens)))
        self.write(r, tokens)
        if data.draw(st.booleans()):
            self.pool.keep(r, tokens)

    def write(self, r, tokens):
        for i in range(r.cached_len // 2, len(tokens) // 2):
            self.contents[r.pages[i]] = tuple(tokens[: 2 * i + 2])

    @precondition(lambda self: self.running)
    @rule(data=st.data())
    def release(self, data):
        entry = data.draw(st.sampled_from(self.running))
        self.running.remove(entry)
        r, tokens, _ = entry
        if confirmed := data.draw(st.booleans()):
            self.write(r, tokens)
        self.pool.release(r, tokens if confirmed else ())

    @invariant()
    def every_page_is_somewhere(self):
        held = {page for r, *_ in self.running for page in r.pages}
        assert len(self.pool) == 10 - len(held)

    def teardown(self):
        for r, *_ in self.running:
            self.pool.release(r)
        assert len(self.pool) == 10


TestModel = Model.TestCase
TestModel.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)


def test_too_many_pages_are_refused():
    pool = PagePool(3, SIZE)
    assert pool.reserve([1] * 10, 3) is None
    assert pool.reserve([1] * 10, 2) is not None
