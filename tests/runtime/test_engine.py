"""The engine over a fake kernel: queueing, resources, cancelling, faults."""

from __future__ import annotations

import random
import threading
import time

import pytest

from imex_persist import FaultError, ImexError, abi
from imex_persist.errors import RingFullError
from imex_persist.runtime.request import Submission
from tests.runtime.fake_kernel import token_of


def finished(request, timeout_s=10.0):
    """All events of a request, as (tokens, finish reason)."""
    tokens = []
    while True:
        event = request.events.get(timeout=timeout_s)
        if isinstance(event, Exception):
            raise event
        if event.token is not None:
            tokens.append(event.token)
        if event.finish_reason:
            return tokens, event.finish_reason


def expected(prompt, count):
    return [token_of(prompt, i) for i in range(count)]


def until(condition, timeout_s=5.0):
    end = time.monotonic() + timeout_s
    while not condition() and time.monotonic() < end:
        time.sleep(0.002)
    assert condition()


def test_one_request(make_engine):
    engine, _ = make_engine()
    request = engine.submit(Submission((1, 2, 3), max_tokens=5))
    assert finished(request) == (expected((1, 2, 3), 5), "length")
    assert engine.drain(5)
    assert (engine.free_slots, engine.free_pages) == (2, 16)


@pytest.mark.timeout(20)
def test_cancel_takes_no_lock(make_engine):
    """The garbage collector cancels what is dropped, in whatever thread and place it runs: with any lock held, or inside a wait."""
    engine, kernel = make_engine()
    kernel.paused.set()
    request = engine.submit(Submission((1, 2, 3), max_tokens=50))
    with engine._lock, engine._wake._cond:
        engine.cancel(request)
    kernel.paused.clear()
    assert finished(request)[1] == "abort" and engine.drain(5)


def test_stop_tokens_and_min_tokens(make_engine):
    engine, _ = make_engine()
    tokens = expected((9,), 10)
    request = engine.submit(Submission((9,), max_tokens=10, stop_token_ids=(tokens[3],)))
    assert finished(request) == (tokens[:4], "stop")
    request = engine.submit(Submission((9,), max_tokens=10, min_tokens=4, stop_token_ids=(tokens[3], tokens[6])))
    assert finished(request) == (tokens[:7], "stop")


def test_a_sink_gets_the_events(make_engine):
    engine, _ = make_engine()
    seen, done = [], threading.Event()

    def sink(event):
        seen.append(event.token)
        if event.finish_reason:
            done.set()

    engine.submit(Submission((4,), max_tokens=3), sink)
    assert done.wait(5) and seen == expected((4,), 3)


def test_requests_wait_for_slots_in_order(make_engine):
    engine, kernel = make_engine(num_slots=2, num_pages=64)
    kernel.paused.set()
    requests = [engine.submit(Submission((i + 1,), max_tokens=4)) for i in range(9)]
    until(lambda: engine.num_waiting == 7)
    assert engine.num_running == 2
    kernel.paused.clear()
    for i, request in enumerate(requests):
        assert finished(request) == (expected((i + 1,), 4), "length")
    starts = [request.slot for request in requests]
    assert set(starts) == {0, 1}
    assert kernel.max_running == 2


def test_a_large_request_is_not_overtaken(make_engine):
    """First come, first served: the small one behind it waits although it would fit."""
    engine, kernel = make_engine(num_slots=3, num_pages=8)
    kernel.paused.set()
    first = engine.submit(Submission((1,), max_tokens=100))  # 4 pages
    large = engine.submit(Submission((2,), max_tokens=200))  # 7 pages
    small = engine.submit(Submission((3,), max_tokens=4))
    until(lambda: engine.num_waiting == 2)
    assert (first.slot >= 0, large.slot, small.slot) == (True, -1, -1)
    kernel.paused.clear()
    assert finished(small)[1] == "length"
    assert first.finished and large.slot >= 0


def test_random_load_gives_everything_back(make_engine):
    engine, _ = make_engine(num_slots=4, num_pages=20)
    rng = random.Random(5)
    requests = []
    for _ in range(300):
        prompt = tuple(rng.randrange(1, 500) for _ in range(rng.randrange(1, 40)))
        if rng.random() < 0.5:
            prompt = (*range(1, 80), *prompt)[: rng.randrange(60, 120)]
        request = engine.submit(Submission(prompt, max_tokens=rng.randrange(1, 60)))
        requests.append((request, rng.random() < 0.3))
        if requests[-1][1]:
            engine.cancel(request)
    for request, cancelled in requests:
        tokens, reason = finished(request)
        s = request.submission
        assert tokens == expected(s.prompt_token_ids, len(tokens))
        assert (reason, len(tokens)) == ("length", s.max_tokens) or (cancelled and reason == "abort")
    assert engine.drain(10)
    assert (engine.free_slots, engine.free_pages) == (4, 20)


def test_more_requests_than_the_record_ring(make_engine):
    engine, _ = make_engine(num_slots=8, num_pages=64)
    requests = [engine.submit(Submission((i + 1,), max_tokens=200)) for i in range(40)]
    for i, request in enumerate(requests):
        assert finished(request) == (expected((i + 1,), 200), "length")


def test_a_full_descriptor_ring_raises_where_nobody_wants_to_wait(make_engine):
    engine, kernel = make_engine(num_slots=32, num_pages=400, max_model_len=64)
    kernel.paused.set()
    requests = [engine.submit(Submission((i + 1,), max_tokens=40)) for i in range(32)]
    until(lambda: engine.num_running == 32)
    for request in requests:
        engine.cancel(request)
    until(lambda: engine._mailbox.unacknowledged == abi.DESCRIPTOR_SLOTS)
    with pytest.raises(RingFullError, match="64 descriptors"):
        engine.submit(Submission((1,), max_tokens=3), wait=False)
    waiting = engine.submit(Submission((1,), max_tokens=3))
    kernel.paused.clear()
    assert finished(waiting) == (expected((1,), 3), "length")
    assert finished(engine.submit(Submission((1,), max_tokens=3), wait=False))[1] == "length"


def test_the_next_turn_shares_the_pages_of_the_last(make_engine):
    engine, kernel = make_engine(num_slots=2, num_pages=16)
    prompt = tuple(range(1, 71))  # pages of 32
    tokens, _ = finished(engine.submit(Submission(prompt, max_tokens=60)))
    assert engine.drain(5) and (engine.free_pages, engine.kept_pages) == (16, 4)  # 129 positions are certain
    turn = engine.submit(Submission((*prompt, *tokens, 500, 501), max_tokens=8))
    assert finished(turn)[0] == expected((*prompt, *tokens, 500, 501), 8)
    assert turn.num_cached_tokens == 128
    assert (engine.num_prompt_tokens, engine.num_cached_tokens) == (70 + 132, 128)
    other = engine.submit(Submission((*prompt[:40], 9, *prompt[41:]), max_tokens=8))
    finished(other)
    assert other.num_cached_tokens == 32
    assert engine.drain(5) and engine.free_pages == 16
    assert kernel.problem is None


def test_a_running_prompt_is_shared_once_its_first_token_is_there(make_engine):
    engine, _ = make_engine(num_slots=2, num_pages=16, step_s=0.005)
    prompt = tuple(range(1, 71))
    first = engine.submit(Submission(prompt, max_tokens=100))
    first.events.get(timeout=5)
    second = engine.submit(Submission(prompt, max_tokens=3))
    finished(second)
    assert second.num_cached_tokens == 64 and not first.finished
    engine.cancel(first)
    assert engine.drain(5) and engine.free_pages == 16


def test_a_prompt_cancelled_before_its_first_token_leaves_nothing(make_engine):
    engine, kernel = make_engine(num_slots=1)
    kernel.paused.set()
    request = engine.submit(Submission(tuple(range(1, 71)), max_tokens=9))
    until(lambda: engine.num_running == 1)
    engine.cancel(request)
    until(lambda: engine._mailbox.unacknowledged == 2)
    kernel.take(), kernel.take()
    kernel.paused.clear()
    assert finished(request) == ([], "abort")
    assert engine.drain(5) and (engine.kept_pages, engine.free_pages) == (0, 16)


def test_what_needs_its_whole_prompt_shares_nothing(make_engine):
    class Whole(Submission):
        needs_whole_prompt = True

    engine, _ = make_engine()
    prompt = tuple(range(1, 71))
    finished(engine.submit(Submission(prompt, max_tokens=2)))
    whole = engine.submit(Whole(prompt, max_tokens=2))
    finished(whole)
    assert whole.num_cached_tokens == 0


def test_sharing_can_be_left_out(make_engine):
    engine, _ = make_engine(share_pages=False)
    for _ in range(2):
        request = engine.submit(Submission(tuple(range(1, 71)), max_tokens=2))
        finished(request)
        assert request.num_cached_tokens == 0


def test_cancelling_a_waiting_request(make_engine):
    engine, kernel = make_engine(num_slots=1)
    kernel.paused.set()
    running, waiting = (engine.submit(Submission((i,), max_tokens=5)) for i in (1, 2))
    until(lambda: engine.num_waiting == 1)
    engine.cancel(waiting)
    assert finished(waiting) == ([], "abort")
    kernel.paused.clear()
    assert finished(running)[1] == "length"
    assert kernel.commands.count(abi.Command.SUBMIT) == 1


def test_cancelling_a_running_request(make_engine):
    engine, kernel = make_engine(num_slots=1, step_s=0.005)
    request = engine.submit(Submission((1,), max_tokens=200))
    request.events.get(timeout=5)
    engine.cancel(request)
    engine.cancel(request)
    tokens, reason = finished(request)
    assert reason == "abort" and len(tokens) < 100
    assert engine.drain(5) and engine.free_slots == 1
    assert kernel.commands.count(abi.Command.CANCEL) == 1
    engine.cancel(request)  # long over: nothing happens
    assert finished(engine.submit(Submission((2,), max_tokens=2)))[1] == "length"


def test_a_full_descriptor_ring_only_delays(make_engine):
    engine, kernel = make_engine(num_slots=32, num_pages=400, max_model_len=64)
    kernel.paused.set()
    requests = [engine.submit(Submission((i + 1,), max_tokens=40)) for i in range(32)]
    until(lambda: engine.num_running == 32)
    for request in requests:
        engine.cancel(request)
    more = [engine.submit(Submission((i + 1,), max_tokens=3)) for i in range(80)]
    time.sleep(0.05)
    kernel.paused.clear()
    for request in requests:
        assert finished(request)[1] == "abort"
    for request in more:
        assert finished(request)[1] == "length"


@pytest.mark.parametrize(
    ("submission", "words"),
    [
        (Submission((), max_tokens=1), "no tokens"),
        (Submission((1,) * 256, max_tokens=1), "256 tokens: at most 255"),
        (Submission((1,) * 200, max_tokens=57), "together at most max_model_len 256"),
        (Submission((1,), max_tokens=1, stop_token_ids=tuple(range(17))), "17 stop tokens"),
        (Submission((1,), max_tokens=200), "needs 7 KV pages but there are 4"),
    ],
)
def test_impossible_requests_are_refused_before_a_descriptor(make_engine, submission, words):
    engine, kernel = make_engine(num_pages=4)
    with pytest.raises(ValueError, match=words):
        engine.submit(submission)
    assert kernel.commands == [] and engine.drain(0)


def test_a_fault_ends_every_request_with_its_error(make_engine):
    engine, kernel = make_engine(num_slots=1, step_s=0.002)
    running, waiting = (engine.submit(Submission((i,), max_tokens=200)) for i in (1, 2))
    running.events.get(timeout=5)
    kernel.header["stop"] = 1
    kernel.thread.join(5)
    engine.fail(FaultError("rank 1 stopped answering"))
    with pytest.raises(FaultError, match="rank 1"):
        finished(running)
    with pytest.raises(FaultError, match="rank 1"):
        finished(waiting)
    with pytest.raises(FaultError, match="rank 1"):
        engine.submit(Submission((3,), max_tokens=1))


def test_tokens_in_the_ring_come_before_the_error(make_engine):
    engine, kernel = make_engine(num_slots=1)
    kernel.paused.set()
    request = engine.submit(Submission((1,), max_tokens=50))
    until(lambda: engine.num_running == 1)
    kernel.header["stop"] = 1
    kernel.thread.join(5)
    kernel.take()
    for _ in range(7):
        kernel.step()
    engine.fail(FaultError("gone"))
    seen = []
    with pytest.raises(FaultError):
        for event in request:
            seen.append(event.token)
    assert seen == expected((1,), 7)


def test_closing_aborts_what_runs(make_engine):
    engine, _kernel = make_engine(num_slots=1, step_s=0.005)
    running, waiting = (engine.submit(Submission((i,), max_tokens=200)) for i in (1, 2))
    running.events.get(timeout=5)
    engine.close()
    assert finished(running)[1] == "abort" and finished(waiting) == ([], "abort")
    with pytest.raises(ImexError, match="closed"):
        engine.submit(Submission((3,), max_tokens=1))
    engine.close()


def test_silence_is_noticed_but_only_while_somebody_waits(make_engine, monkeypatch):
    monkeypatch.setattr("imex_persist.runtime.engine.SILENCE_S", 0.05)
    calls = []
    engine, kernel = make_engine(on_silence=lambda: calls.append(1))
    assert finished(engine.submit(Submission((1,), max_tokens=3)))[1] == "length"
    time.sleep(0.3)
    assert calls == []
    kernel.paused.set()
    request = engine.submit(Submission((1,), max_tokens=3))
    until(lambda: calls)
    kernel.paused.clear()
    assert finished(request)[1] == "length"


def test_a_bug_in_a_sink_does_not_hang_the_others(make_engine, monkeypatch):
    monkeypatch.setattr(threading, "excepthook", lambda _: None)
    engine, _ = make_engine(step_s=0.005)  # so that the other request is still running

    def sink(_event):
        raise RuntimeError("sink")

    other = engine.submit(Submission((1,), max_tokens=250))
    engine.submit(Submission((2,), max_tokens=2), sink)
    with pytest.raises(RuntimeError, match="sink"):
        finished(other)
