"""Whole models through the mailbox: the tokens of several requests at once against the reference's, and what must not change a bit.

A request's bits may depend on the model, the number of ranks and of down_proj's slices, and on nothing else: not on the schedule,
the company, how sums cross ranks, or the size of the grid.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from imex_persist.abi import Finish, Phase, Record, Strategy
from imex_persist.model import sampling
from imex_persist.model.dummy import DummyWeights
from imex_persist.model.weights import DictWeights, tensor_shapes
from imex_persist.planner import partial_width

from . import drawing
from .cases import Case, uses
from .drawing import logprobs_of, sampling_record
from .whole import (
    MODELS,
    NUM_MODELS,
    WEAK,
    check_greedy,
    logit_limit,
    prompt_of,
    reference_logits,
    run_whole,
    same_bits,
    with_options,
)

EVERY_MODEL = pytest.mark.parametrize("index", range(NUM_MODELS))
SOME_MODELS = pytest.mark.parametrize("index", range(0, NUM_MODELS, 2))
PLAIN = uses(lambda index: [(MODELS[index], {})])
TAPPED = uses(lambda index: [(MODELS[index], {"tap": True})])


def requests_of(case) -> list[dict]:
    """As many requests as there are slots, with prompts shorter and longer than a step."""
    rng = np.random.default_rng(case.seed)
    rows = case.options["max_rows"]
    lengths = [int(rng.integers(1, 2 * rows + 6)) for _ in range(case.options["num_slots"])]
    return [{"prompt": prompt_of(case, n, i), "max_tokens": int(rng.integers(1, 12))} for i, n in enumerate(lengths)]


@EVERY_MODEL
@PLAIN
def test_tokens(make_device, index):
    requests = requests_of(MODELS[index])
    run = run_whole(make_device, MODELS[index], requests)
    assert run.finishes == [Finish.LENGTH] * len(requests)
    assert [len(tokens) for tokens in run.tokens] == [r["max_tokens"] for r in requests]
    assert check_greedy(run) <= 1  # the margins of these models are rarely so small


@SOME_MODELS
@PLAIN
def test_stop_tokens(make_device, index):
    """The end token is the last one handed out; what the kernel had begun by then is dropped, and min_tokens puts it off."""
    case = MODELS[index]
    requests = [r | {"max_tokens": 8} for r in requests_of(case)]
    free = run_whole(make_device, case, requests).tokens
    ends = [2 + i for i in range(len(requests))]  # the token at which each is to end, if it has not come before
    stopped = [r | {"stop": (case.config.vocab_size, free[i][ends[i]])} for i, r in enumerate(requests)]
    run = run_whole(make_device, case, stopped)
    assert run.tokens == [tokens[: tokens.index(tokens[end]) + 1] for tokens, end in zip(free, ends, strict=True)]
    assert run.finishes == [Finish.STOP] * len(requests)
    late = run_whole(make_device, case, [r | {"min_tokens": 7} for r in stopped])
    assert late.tokens == free
    assert late.finishes == [
        Finish.STOP if tokens[7] == tokens[end] else Finish.LENGTH for tokens, end in zip(free, ends, strict=True)
    ]


@SOME_MODELS
@TAPPED
def test_logits(make_device, index):
    """The full logits of a request's last step."""
    case = MODELS[index]
    prompt = prompt_of(case, 2 * case.options["max_rows"] + 3)
    run = run_whole(make_device, case, [{"prompt": prompt, "max_tokens": 5}], tap=True)
    expected = reference_logits(run, 0)[-1]
    error = np.abs(run.logits()[0] - expected).max()
    assert error <= logit_limit(expected), f"{error} of {logit_limit(expected)}"
    assert run.tokens[0][-1] == run.logits()[0].argmax()


LONG = with_options(replace(MODELS[4], num_blocks=4), max_rows=16, world_size=2)


@pytest.mark.parametrize("rounded", [False, True])
@uses(lambda rounded: [(LONG, {"tap": True, "float24_partials": rounded})])
def test_long_context(make_device, rounded):
    """A prompt whose last positions attend to runs that are merged, over several pages, chunk after chunk."""
    case = LONG
    run = run_whole(make_device, case, [{"prompt": prompt_of(case, 270), "max_tokens": 3}], tap=True, float24_partials=rounded)
    assert run.shape["max_splits"] > 1
    assert run.words(0, "off_split", int(run.shape["off_o_part"] - run.shape["off_split"])).any()
    check_greedy(run)
    expected = reference_logits(run, 0)[-1]
    assert np.abs(run.logits()[0] - expected).max() <= logit_limit(expected)


# ------------------------------------------------------------------------------------------------ not a bit
@SOME_MODELS
@TAPPED
def test_same_run_twice(make_device, index):
    """Also under another schedule: late stores and copies, halves of words, blocks that stand still."""
    case = MODELS[index]
    one = [{"prompt": prompt_of(case, case.options["max_rows"] + 2), "max_tokens": 6}]
    first = run_whole(make_device, case, one, tap=True)
    for seed in range(2):
        again = run_whole(make_device, case, one, tap=True, device_options=WEAK | {"seed": seed})
        same_bits(first, again, f"seed {seed}")


@EVERY_MODEL
@PLAIN
def test_tokens_under_any_schedule(make_device, index):
    """Several requests: when each is admitted depends on the schedule, their tokens do not, and their keys and values neither."""
    case = MODELS[index]
    requests = requests_of(case)
    first = run_whole(make_device, case, requests)
    again = run_whole(make_device, case, requests, device_options=WEAK | {"seed": index})
    assert again.tokens == first.tokens
    for rank, (a, b) in enumerate(zip(first.pages(), again.pages(), strict=True)):
        np.testing.assert_array_equal(a, b, f"KV pages of rank {rank}")


def company(case, length: int) -> list[dict]:
    """Two requests that share all steps but the first: the second is admitted while the first's one-step prompt is computed."""
    return [
        {"prompt": prompt_of(case, 1, 7), "max_tokens": length + 1},
        {"prompt": prompt_of(case, 1, 8), "max_tokens": length},
    ]


def with_room_for_two(index: int) -> Case:
    case = MODELS[index]
    return with_options(case, max_rows=2, num_slots=2, one_shot_rows=1) if case.options["num_slots"] < 2 else case


@SOME_MODELS
@uses(lambda index: [(with_room_for_two(index), {"tap": tap}) for tap in (False, True)])
def test_alone_and_in_company(make_device, index):
    """Token for token, and in the last step bit for bit."""
    case = with_room_for_two(index)
    together = run_whole(make_device, case, company(case, 6), tap=True)
    last = [r["sequence"] for r in together.kernel.records if r["kind"] == Record.TOKEN and r["finish"]]
    same_step = last[1] == last[0] + 1  # else the first was released between them: a GPU's host may be late with the second
    assert same_step or together.kernel.device.name != "sim"
    for i, request in enumerate(company(case, 6)):
        alone = run_whole(make_device, case, [request], tap=True)
        assert alone.tokens[0] == together.tokens[i]
        if same_step:
            np.testing.assert_array_equal(alone.logits()[0], together.logits()[i], f"logits of request {i}")
    requests = requests_of(case)
    together = run_whole(make_device, case, requests)
    for i, request in enumerate(requests):
        assert run_whole(make_device, case, [request]).tokens[0] == together.tokens[i]


def drawn_requests(case) -> list[dict]:
    """requests_of, of which every other one is drawn with penalties and log-probabilities."""
    rng, out = np.random.default_rng([case.seed, 1]), []
    for i, r in enumerate(requests_of(case)):
        params = {
            "seed": int(rng.integers(2**40)), "temperature": float(rng.choice([0.7, 1.5])), "max_tokens": r["max_tokens"],
            "repetition_penalty": 1.3, "presence_penalty": 0.2, "frequency_penalty": 0.3, "logprobs": int(rng.choice([0, 4])),
        }  # fmt: skip
        out.append(drawing.request(case.config.vocab_size, r["prompt"], **params) if i % 2 == 0 else r)
    return out


@EVERY_MODEL
@PLAIN
def test_drawn_tokens(make_device, index):
    """Against the reference's logits: every token is the reference's draw, or one that the tolerance cannot tell from it. The others
    are what they are without such company.
    """
    case = MODELS[index]
    requests = drawn_requests(case)
    run = run_whole(make_device, case, requests)
    for i, r in enumerate(requests):
        assert run.tokens[i] == run_whole(make_device, case, [r]).tokens[0]
        if "sampling" not in r:
            continue
        logits, tokens, s = reference_logits(run, i), run.tokens[i], sampling_record(r["sampling"])
        limits = np.broadcast_to(logit_limit(logits), len(tokens)) * 1.3 / s["temperature"]  # penalties enlarge errors too
        for n, token in enumerate(tokens):
            x = sampling.scale(logits[n], s, r["prompt"], tokens[:n]) + sampling.noise(s["seed"], n, logits.shape[1])
            assert x.max() - x[token] <= 2 * limits[n], f"request {i}: token {n} is {token}, {x[token]} of {x.max()}"
        exact = [sampling.log_softmax(row) for row in logits]
        for n, found in enumerate(logprobs_of(run.kernel.records, i)):
            assert found[0][0] == tokens[n] and len(found) == r["sampling"].num_logprobs
            assert all(abs(logprob - exact[n][id]) <= 2 * logit_limit(logits[n]) for id, logprob, _ in found)


def ways(index: int) -> list[tuple[Case, dict]]:
    """All ways of exchange: the same for all steps, or ONE_SHOT for small ones."""
    case = with_options(MODELS[index], world_size=max(2, MODELS[index].options["world_size"]))
    rows, local, two_shot = case.options["max_rows"], Strategy.ONE_SHOT_LOCAL, Strategy.TWO_SHOT
    most = ((local, rows), (local, 0), (two_shot, 0), (two_shot, rows // 2), (Strategy.SEMAPHORE, 0))
    return [(case, {"tap": True, "strategy": strategy, "one_shot_rows": n}) for strategy, n in most]


@SOME_MODELS
@uses(ways)
def test_strategies_agree(make_device, index):
    """Sums are added in one order whoever adds them."""
    one = [{"prompt": prompt_of(MODELS[index], MODELS[index].options["max_rows"] + 1), "max_tokens": 4}]
    first, *others = [run_whole(make_device, case, one, **options) for case, options in ways(index)]
    for run in others:
        same_bits(first, run, f"{Strategy(run.shape['strategy']).name} above {run.shape['one_shot_rows']} rows")


def rounded_ways(index: int) -> list[tuple[Case, dict]]:
    """Partial sums exchanged with 24 bits."""
    return [(case, options | {"float24_partials": True}) for case, options in ways(index)]


@SOME_MODELS
@uses(rounded_ways)
def test_strategies_agree_on_rounded_sums(make_device, index):
    """Rounding comes before the exchange, so it is the same whoever adds; and it is little."""
    one = [{"prompt": prompt_of(MODELS[index], MODELS[index].options["max_rows"] + 1), "max_tokens": 4}]
    first, *others = [run_whole(make_device, case, one, **options) for case, options in rounded_ways(index)]
    for run in others:
        same_bits(first, run, f"{Strategy(run.shape['strategy']).name} above {run.shape['one_shot_rows']} rows")
    exact = run_whole(make_device, ways(index)[0][0], [one[0] | {"max_tokens": 1}], tap=True).logits()[0]
    rounded = run_whole(make_device, ways(index)[0][0], [one[0] | {"max_tokens": 1}], tap=True, float24_partials=True).logits()[
        0
    ]
    assert np.abs(rounded - exact).max() < 0.02 * exact.std()


def renewals(index: int) -> list[tuple[Case, dict]]:
    """Epochs that begin again: hardly ever, every other step, every step. Wide words have but 16 bits of them."""
    return [
        (MODELS[index], {"tap": True, "float24_partials": True} | more) for more in ({}, {"renew_steps": 2}, {"renew_steps": 1})
    ]


@pytest.mark.parametrize("index", (0, 2))
@uses(renewals)
def test_epochs_begin_again(make_device, index):
    """Whatever steps before have left in rows that a step does not have, nothing of it is taken for this step's."""
    rows = MODELS[index].options["max_rows"]
    two = [{"prompt": prompt_of(MODELS[index], n), "max_tokens": 5} for n in (rows + 1, 1)]
    first, *others = [
        run_whole(make_device, case, two[: case.options["num_slots"]], **options) for case, options in renewals(index)
    ]
    for run in others:
        assert run.tokens == first.tokens, f"epochs of {run.shape['renew_steps']} steps"


def grids(index: int) -> list[tuple[Case, dict]]:
    least = MODELS[index].options["down_slices"]
    return [(replace(MODELS[index], num_blocks=n), {"tap": True}) for n in (least, least + 1, 8)]


@SOME_MODELS
@uses(grids)
def test_grids_agree(make_device, index):
    """Blocks share the work; below 257 positions they do not change how a sum is cut."""
    one = [{"prompt": prompt_of(MODELS[index], MODELS[index].options["max_rows"] + 1), "max_tokens": 4}]
    first, *others = [run_whole(make_device, case, one, **options) for case, options in grids(index)]
    for run in others:
        same_bits(first, run, f"{run.shape['num_blocks']} blocks")


def of_several_ranks(index: int) -> Case:
    case = MODELS[index]
    return with_options(case, world_size=2) if case.options["world_size"] == 1 else case


@EVERY_MODEL
@uses(lambda index: [(of_several_ranks(index), {"tap": True})])
def test_ranks_agree(make_device, index):
    """What all ranks hold, they hold bit for bit: plans, tokens, the residual, the words of every exchange."""
    case = of_several_ranks(index)
    run = run_whole(make_device, case, requests_of(case), tap=True)
    size = {name: int(run.shape[name]) for name in run.shape.dtype.names}
    wide, rows = size["hidden_size"], size["max_rows"]
    shared = {"off_plan": 2 * (2 + 4 * rows), "off_best": size["world_size"] * size["num_blocks"] * rows * 2}
    if size["strategy"] != Strategy.TWO_SHOT:  # else only a slice's owner has its partial sums
        sources = size["world_size"] * rows * partial_width(wide)
        shared |= {"off_o_part": sources, "off_down_part": sources * size["down_slices"]}
    for field, count in shared.items():
        words = [run.words(rank, field, count) for rank in range(size["world_size"])]
        for other in words[1:]:
            np.testing.assert_array_equal(other, words[0], field)
    for field in "off_o_sum", "off_down_sum":  # left unused in ONE_SHOT
        sums = [run.kernel.bare(rank, field) for rank in range(size["world_size"])]
        for other in sums[1:]:
            np.testing.assert_array_equal(other, sums[0], field)
    for other in run.taps(Phase.EMBED)[1:]:
        np.testing.assert_array_equal(other, run.taps(Phase.EMBED)[0])


# ------------------------------------------------------------------------------------------------ the LM head
def narrow(world_size: int) -> Case:
    return with_options(MODELS[0], max_rows=4, one_shot_rows=2, world_size=world_size)


@pytest.mark.parametrize("world_size", [1, 2])
@uses(lambda world_size: [(narrow(world_size), {"tap": True})])
def test_steps_that_sample_nothing_skip_the_lm_head(make_device, world_size):
    """A prompt of five steps, of which the last has one row and alone needs logits: nobody computed those of another row."""
    case = narrow(world_size)
    run = run_whole(make_device, case, [{"prompt": prompt_of(case, 17), "max_tokens": 4}], tap=True)
    assert run.logits()[0].all()
    assert not run.logits()[1:].any()
    check_greedy(run)


def weights_with(case, **changes: np.ndarray) -> DictWeights:
    """The case's random weights with some tensors replaced (dots in names are double underscores)."""
    source = DummyWeights(case.config, case.seed)
    tensors = {name: source.read(name) for name in tensor_shapes(case.config)}
    return DictWeights(tensors | {name.replace("__", "."): value.astype(np.float32) for name, value in changes.items()})


def of_vocabulary(world_size: int, vocab_size: int) -> Case:
    config = replace(MODELS[0].config, vocab_size=vocab_size, tie_word_embeddings=False)
    return with_options(replace(MODELS[0], config=config), world_size=world_size)


@pytest.mark.parametrize("world_size", [1, 2, 4])
@pytest.mark.parametrize("vocab_size", [10, 61])
@uses(lambda world_size, vocab_size: [(of_vocabulary(world_size, vocab_size), {})])
def test_ties_and_padding(make_device, world_size, vocab_size):
    """Ids that pad the vocabulary have a logit of zero, and ranks may have nothing else: they are never sampled, not even where all
    others are negative; of equal logits the lowest id wins.
    """
    case = of_vocabulary(world_size, vocab_size)
    hidden = case.config.hidden_size
    # every embedding has one large value that no layer outweighs, and every row of the LM head looks at it alone
    spike = np.zeros((vocab_size, hidden))
    spike[:, 5] = 100
    head = np.zeros((vocab_size, hidden))
    for sign, favourite in ((-1, 7), (1, 3)):
        head[:, 5] = sign
        run = run_whole(
            make_device, case, [{"prompt": [1, 2, 3], "max_tokens": 3}],
            source=weights_with(case, model__embed_tokens__weight=spike, lm_head__weight=head),
        )  # fmt: skip
        assert run.tokens == [[0, 0, 0]], "all are equal: the lowest id wins"
        better = head.copy()
        better[[favourite, vocab_size - 2], 5] = sign + 0.5
        run = run_whole(
            make_device, case, [{"prompt": [1, 2, 3], "max_tokens": 3}],
            source=weights_with(case, model__embed_tokens__weight=spike, lm_head__weight=better),
        )  # fmt: skip
        assert run.tokens == [[favourite] * 3]
