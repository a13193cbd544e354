"""Everything host and device both know, written once.

`make abi` renders the C++ side (abi_render.py); a test compares the two, and every size is `static_assert`ed there. No struct has
padding, so sizes settle offsets. Structs are NumPy dtypes of 32- and 64-bit fields, so `struct.pack_into` and NumPy both read them.
"""

from __future__ import annotations

import enum
from collections.abc import Iterable

import numpy as np

# ------------------------------------------------------------------------------------------------ constants
MAX_RANKS = 8  # ranks that may exchange partial sums
MAX_ROWS = 16  # rows of a step: the tensor core's m = 16 operand
FEW_ROWS = 4  # up to here a product takes tiles in groups of two, and activations stay in registers
MAX_SLOTS = 16  # sequences resident at once: each has a row of its own in every step
MAX_SPLITS = 32  # runs of the context that different blocks attend to
MAX_STAGES = 24  # ring stages
STAGE_BYTES = 16384  # one ring stage: a weight tile or a KV page
TILE_K = 1024  # columns of K in a full weight tile: 8 rows x 1024 x 2 bytes = STAGE_BYTES
UNIT_ROWS = 8  # output rows computed together: the tensor core's n = 8 operand
CHUNK = 32  # positions of the context that one warp attends to at a time
MAX_HEAD_DIM = 128
MERGE_EXTRA = 4  # floats behind a query's values where warps merge: maximum, sum, and two that keep queries apart in the banks
CONSUMER_WARPS = 8  # warps 0-7 multiply
ADDER_WARPS = 2  # warps 8 and 9 add the consumers' partial sums and send the results off
TRACE_WRITERS = 1 + ADDER_WARPS  # rings of a block: its consumers', its adders'
ALIGN_ROUNDS = 4  # round trips of an alignment of clocks, of which the shortest counts
ALIGN_EVERY = 4  # traced steps between two alignments, unless the kernel was idle
ALIGN_SLOTS = 64  # alignments that a rank's trace remembers
NUM_WARPS = 12  # warp 10 streams, warp 11 is the mailbox
PART_SLOTS = 4  # units whose partial sums may be in flight between consumers and adders; a multiple of ADDER_WARPS
MAX_STOP_IDS = 16  # token ids that end a request, EOS among them
PLAN_HEADER_WORDS = 2
PLAN_ROW_WORDS = 4
SAMPLING_WORDS = 32  # of a row's struct Sampling, which follows the stop token ids in the arena and travels beside the plan
MAX_LOGPROBS = 20
SEARCH_PIVOTS = 16  # keys at which one round of the threshold search counts
SEARCH_ROUNDS = 19  # exchanges of a search at most
DRAW_ROW_BYTES = 2048  # of shared memory, in place of the activations, that a row takes while it is drawn
SHARED_HEADER_BYTES = 8192  # barriers, plan and small arrays at the start of shared memory (struct Shared), for any shape
DESCRIPTOR_SLOTS = 64  # entries of the descriptor ring
RECORD_SLOTS = 4096  # entries of the record ring
TOKEN_FROM_ROW = 0x80000000  # plan: the token is what row (value & 0xff) of the previous step sampled
ROW_SAMPLES = 0x80000000  # plan: this row's logits are sampled (set in the slot word)
ROW_DRAWS = 0x40000000  # plan: this row is not plainly greedy, its struct Sampling travels beside the plan (in the slot word)
ROW_SLOT = 0xFF  # plan: the slot in the slot word
TRACE_CUT = 0x80000000  # attention's READY: a row's context is cut into runs, which all blocks merge
PLAN_ALIGNS = 0x80000000  # plan: clocks are aligned before this step (set in the header's second word; trace.cuh)
PLAN_NEW_PAGES = 0x80000000  # plan: a page table was written since the step before (set in the header's first word)
DESCRIPTOR_MAGIC = 0x494D4558  # "IMEX": what tells the places of a descriptor's words apart in its check
DESCRIPTOR_FACTOR = 0x9E3779B1  # odd, so that multiplying by it loses nothing


class Phase(enum.IntEnum):
    """The phases of a decode step: a file in cuda_src/phases, a reference function, a test, a trace span."""

    EMBED = 0
    QKV = 1
    ATTENTION = 2
    O_PROJ = 3
    GATE_UP = 4
    DOWN_PROJ = 5
    LM_HEAD = 6
    SAMPLE = 7


class Wait(enum.IntEnum):
    """What a block was waiting for when a deadline passed, beside the phase's own words."""

    WORDS = 0  # activations or partial sums of another block or rank
    TILE = 1  # a bulk copy into the ring
    STAGE = 2  # a free ring stage
    PARTIAL = 3  # a unit's partial sums, or their room, between the warps of a block
    PLAN = 4  # the next step's plan
    STEP = 5  # the block's own consumers, before KV pages may be streamed
    COUNT = 6  # nothing: the kernel has run as many steps as it can count, and must be started anew


class Command(enum.IntEnum):
    """What the host asks of the resident kernel (Descriptor.command) and rank 0 of all blocks (plan header)."""

    NONE = 0
    SUBMIT = 1  # start a request in a slot
    CANCEL = 2  # stop a request before its end
    NOOP = 3  # acknowledged, nothing else: the doorbell's round trip
    SHUTDOWN = 4  # return from the kernel once every slot is free


class Record(enum.IntEnum):
    """Kinds of TokenRecord."""

    NONE = 0
    TOKEN = 1  # a generated token
    RELEASE = 2  # no step touches the request's slot and pages any more
    ACK = 3  # a command was taken; `token` is the descriptor's sequence number
    LOGPROB = 4  # before a TOKEN: one of its log-probabilities, `token` its id, `index` its rank, `finish` the float32's bits


class Finish(enum.IntEnum):
    """Why a request ended (TokenRecord.finish); NONE while it goes on."""

    NONE = 0
    STOP = 1
    LENGTH = 2
    CANCELLED = 3


class Draw(enum.IntEnum):
    """Which rows of a request are not plainly greedy (Descriptor.draw)."""

    NONE = 0
    MASKED = 1  # those that sample while fewer than min_tokens are out
    SAMPLED = 2  # all that sample
    ALL = 3  # all: prompt tokens are marked for the repetition penalty


class Strategy(enum.IntEnum):
    """How partial sums cross ranks; docs/architecture.md has the picture of each."""

    ONE_SHOT = 0  # every block reads every rank's words
    ONE_SHOT_LOCAL = 1  # a slice owner in each rank sums and publishes inside its GPU
    TWO_SHOT = 2  # one rank owns a slice, sums it and publishes to all ranks
    SEMAPHORE = 3  # plain stores, a fence, a signal: the usual way, to compare with


class Mark(enum.IntEnum):
    """Kinds of TraceEvent: SENT by a block's adders, the others by one thread of its consumers. Waits are in clocks of the SM."""

    CLOCK = 0  # a step begins; `value` is the GPU's timer in ns, to pair with `clock`; bits 32-55 are in bits 8-31 of `what`
    BEGIN = 1  # the phase is entered
    INPUT = 2  # the words it takes in have arrived; `value`: waited for them, if the first poll did not find them
    READY = 3  # the activations are ready to be multiplied; `value`: 1 if they are, in attention the pages that were read, and TRACE_CUT
    END = 4  # the block's last unit of the phase is handed on; `value`: waited for tiles, in embed the rows of the step
    SUM = 5  # a slice owner's first thread has published its sums; `value`: waited for the ranks' words
    SENT = 6  # the adder's last words of the phase have left; `value`: clocks since its first had
    MET = 7  # the block's warps have met: the slowest is done with the phase before, and its activations may be overwritten
    PAIR = 8  # a layer or the LM head begins, or the step ends: as CLOCK, since an SM's clock does not keep its rate for a step
    TAKEN = 9  # in a phase with SUM: the phase's first tiles have been taken; `value`: waited for them


class Probe(enum.IntEnum):
    """What a launch of cuda_src/bench measures: floor.cu, or exchange.cu the last two."""

    READ = 0  # device memory through the ring, as weights are read
    GATHER = 1  # words that are there already, by every block
    BARRIER = 2  # a word of every block to every block
    ECHO = 3  # a word from the host and back
    PING = 4  # a word to another rank and back
    ALL_REDUCE = 5  # partial sums of all ranks, until every block has the whole sum
    ALL_GATHER = 6  # parts of a vector, until every block has all of it


# ------------------------------------------------------------------------------------------------ structs
def _struct(*fields: tuple) -> np.dtype:
    return np.dtype(list(fields), align=True)


Shape = _struct(
    # the model, per rank; sizes are padded: hidden and intermediate to 32, head_dim to 32, vocabulary to 8
    ("hidden_size", "u4"),
    ("num_layers", "u4"),
    ("num_heads", "u4"),
    ("num_kv_heads", "u4"),
    ("head_dim", "u4"),
    ("intermediate_size", "u4"),
    ("vocab_rows", "u4"),  # rows of this rank's part of the LM head
    ("vocab_size", "u4"),  # token ids at or above are never sampled
    ("norm_size", "u4"),  # hidden size before padding: the divisor of RMSNorm
    ("rms_eps", "f4"),
    ("attn_scale", "f4"),
    # the machine
    ("world_size", "u4"),
    ("num_blocks", "u4"),  # blocks of one rank
    ("ring_stages", "u4"),
    ("window", "u4"),  # tiles in flight at once, at least a group of two: its second waits for what left before its first
    # the plan
    ("max_rows", "u4"),
    ("one_shot_rows", "u4"),  # steps of at most so many rows exchange ONE_SHOT
    ("strategy", "u4"),  # Strategy of larger steps
    ("float24_partials", "u4"),  # 1: partial sums are rounded to 24 bits before they are exchanged, two in a word
    ("down_slices", "u4"),  # parts of down_proj's K; a block serves one
    ("max_splits", "u4"),
    ("attention_rows", "u4"),  # rows of a sequence that attention takes together
    ("scratch_warps", "u4"),  # warps whose results of an item attention keeps in a stage of the ring; 0: it takes no stage
    ("page_size", "u4"),  # positions of a KV page
    ("num_pages", "u4"),
    ("pages_per_slot", "u4"),
    ("num_slots", "u4"),
    ("renew_steps", "u4"),  # epochs begin again after so many steps, a power of two
    # symmetric memory, offsets in words of 8 bytes
    ("off_plan", "u4"),
    ("off_sampling", "u4"),
    ("off_qkv", "u4"),
    ("off_split", "u4"),
    ("off_o_part", "u4"),
    ("off_down_part", "u4"),
    ("off_best", "u4"),
    ("off_logits", "u4"),
    ("off_search", "u4"),
    ("off_logprob", "u4"),
    ("off_align", "u4"),  # nothing unless `trace` is set
    ("off_renew", "u4"),
    ("off_page_table", "u4"),  # not words: u32 [num_slots, pages_per_slot]
    ("off_abort", "u4"),
    # from here on bare words (cuda_src/bare.cuh), [num_layers + 1, max_rows, row_words]; offsets in the first row
    ("off_attn", "u4"),
    ("off_o_sum", "u4"),
    ("off_gate", "u4"),
    ("off_down_sum", "u4"),
    ("row_words", "u4"),
    ("symmetric_words", "u4"),
    # shared memory, offsets in bytes
    ("smem_x", "u4"),
    ("smem_part", "u4"),
    ("smem_residual", "u4"),
    ("smem_rope", "u4"),
    ("smem_ring", "u4"),
    ("smem_bytes", "u4"),
    # compile-time switches
    ("tap", "u4"),  # 1: every phase's output also goes to RankParams.tap
    ("only_phase", "u4"),  # 0: the whole step; 1 + Phase: that phase alone, once, of layer `only_layer`
    ("only_layer", "u4"),
    ("trace", "u4"),  # events of each ring in RankParams.trace, a power of two; 0: tracing is compiled out
    ("trace_every", "u4"),  # one step of so many is traced
)

RankParams = _struct(
    # weights in tile order (imex_persist/model/packing.py); bf16
    ("qkv", "u8"),
    ("o_proj", "u8"),
    ("gate_up", "u8"),
    ("down_proj", "u8"),
    ("lm_head", "u8"),
    ("embed", "u8"),
    ("norms", "u8"),  # bf16 [2 * num_layers + 1, hidden_size]: input, post-attention of each layer, final
    ("rope", "u8"),  # float [max positions, head_dim / 2, 2]: cos, sin
    ("kv", "u8"),  # bf16 [num_layers, num_pages, num_kv_heads, page bytes / 2]
    ("claims", "u8"),  # u32 [2, num_layers * (3 + down_slices) + 1], zeroed before launch
    ("peers", "u8", MAX_RANKS),  # symmetric memory of each rank as this rank maps it, [rank] its own
    ("counts", "u8"),  # u32 [num_blocks, num_slots, own tokens], zeroed; cuda_src/draw.cuh
    ("scaled", "u8"),  # float [num_blocks, max_rows, own tokens], where shared memory is too small for them
    ("logprobs", "u8"),  # u32 [2, max_rows, 1 + MAX_LOGPROBS, 4], of rank 0's block 0 for its mailbox
    ("mailbox", "u8"),  # struct Mailbox, mapped host memory; rank 0 only
    ("fault", "u8"),  # struct FaultRecord, mapped host memory
    ("tap", "u8"),  # float, see cuda_src/tap.cuh; 0 unless Shape.tap
    ("trace", "u8"),  # TraceEvent [num_blocks, TRACE_WRITERS, Shape.trace], then [ALIGN_SLOTS, num_blocks + world_size]
    ("rank", "u4"),
    ("deadline_us", "u4"),  # how long a wait may take
)

LaunchParams = _struct(
    ("ranks", RankParams, MAX_RANKS),  # the ranks of this launch, first `num_ranks` valid
    ("num_ranks", "u4"),
    ("_pad", "u4"),
)

Descriptor = _struct(  # one 64-byte line, host -> device
    ("sequence", "u4"),  # 1, 2, 3, …; the entry is taken when it is the expected one and `check` matches
    ("command", "u4"),
    ("request", "u4"),
    ("slot", "u4"),
    ("arena", "u4"),  # offset in u32 into Mailbox's arena: prompt ids, page ids, stop token ids, then struct Sampling
    ("prompt_len", "u4"),
    ("num_pages", "u4"),
    ("num_stop", "u4"),
    ("max_tokens", "u4"),
    ("min_tokens", "u4"),
    ("cached_len", "u4"),  # positions whose keys and values are in the pages already: whole pages, less than the prompt
    ("draw", "u4"),  # Draw
    ("num_logprobs", "u4"),  # LOGPROB records before each token, the token's own among them; 0: none
    ("first_token", "u4"),  # prompt[0] and pages[0]: a first step of one row needs no more, so it does not wait for the arena
    ("first_page", "u4"),
    ("check", "u4"),  # descriptor_check of the other fifteen words
)

Sampling = _struct(  # how a request's tokens are drawn (imex_persist/runtime/sampling.py); SAMPLING_WORDS long
    ("seed", "u4", 2),  # low and high word: the key of Philox
    ("temperature", "f4"),  # 0: the largest logit
    ("min_p", "u4"),  # 0: off
    ("log_min_p", "f4"),
    ("top_k", "u4"),  # 0: off
    ("top_p", "u4"),  # in units of 2^-32; 0: off
    ("repetition_penalty", "f4"),
    ("presence_penalty", "f4"),
    ("frequency_penalty", "f4"),
    ("prompt_len", "u4"),
    ("min_tokens", "u4"),
    ("num_masked", "u4"),
    ("num_logprobs", "u4"),
    ("masked", "u4", MAX_STOP_IDS),  # never drawn while fewer than min_tokens are out
    ("_pad", "u4", 2),
)

RECORD_WORDS = (
    "kind",
    "request",
    "token",
    "index",  # 0, 1, … of the request's generated tokens
    "finish",
    "_reserved",
    "time_low",  # device clock in ns when the step's tokens were known
    "time_high",
)

# Device -> host, one 64-byte line of tagged words: each is one store, and its tag is the record's sequence number, 1, 2, 3, …
# A record is there when all tags are the expected one, in whatever order the words arrive.
TokenRecord = _struct(*((name, "u4") for word in RECORD_WORDS for name in (word, f"{word}_tag")))

TraceEvent = _struct(  # device -> host, one 16-byte store
    ("clock", "u4"),  # low word of the SM's clock
    ("what", "u4"),  # Mark | Phase << 8 | layer << 16
    ("value", "u4"),
    ("step", "u4"),  # counted from 1: 0 is an event never written
)

FaultRecord = _struct(  # device -> host, one a rank; `valid` is stored last, with release
    ("valid", "u4"),
    ("rank", "u4"),
    ("block", "u4"),
    ("phase", "u4"),
    ("layer", "u4"),
    ("wait", "u4"),
    ("expected", "u4"),
    ("seen", "u4"),
    ("waited_us", "u4"),
    ("source", "u4"),  # rank whose word was missing, when the wait knows it, else the own rank
    ("_reserved", "u4", 6),
)

ProbeJob = _struct(  # what a kernel of cuda_src/bench is to do, in device memory; RankParams.tap points to it
    ("probe", "u4"),  # Probe
    ("iterations", "u4"),  # that are timed
    ("warmup", "u4"),  # before them
    ("epoch", "u4"),  # the last one that words in memory carry
    ("partner", "u4"),  # the other rank of a PING
    ("rows", "u4"),  # of an exchange
    ("fractions", "u4"),  # of an ALL_REDUCE: 0 adds small whole numbers, 1 fractions
    ("_pad", "u4"),
    ("data", "u8"),  # what is read
    ("bytes", "u8"),  # of it
    ("host", "u8"),  # mapped host memory: a line that the host writes, a line that the device writes
    ("times", "u8"),  # u64 [num_blocks, 2]: timer of every block when the timed iterations began and ended
    ("result", "u8"),
)

MailboxHeader = _struct(  # each writer has 64-byte lines of its own
    ("heartbeat", "u4"),  # host: changes at least every second while the host lives
    ("records_read", "u4"),  # host: records consumed so far
    ("stop", "u4"),  # host: non-zero asks every rank to abort
    ("_host", "u4", 13),
    ("resident", "u4"),  # device: 1 once rank 0's mailbox polls, 2 after it returned
    ("steps", "u4"),  # device: steps completed
    ("_device", "u4", 14),
)

Mailbox = _struct(  # mapped host memory; the arena of u32 follows
    ("header", MailboxHeader),
    ("descriptors", Descriptor, DESCRIPTOR_SLOTS),
    ("records", TokenRecord, RECORD_SLOTS),
)


def descriptor_check(words: Iterable[int]) -> int:
    """The check word of a descriptor's other fifteen: the sum of what each, with its place, is mixed to. That is one-to-one, so a line in
    which one word is old never fits, and one with several as often as 32 random bits do; a plain sum forgives two that differ alike."""
    return sum(_mixed(i, word) if word else _MIXED_ZEROS[i] for i, word in enumerate(words)) & 0xFFFFFFFF


def _mixed(i: int, word: int) -> int:
    mixed = (word ^ (i + 1) * DESCRIPTOR_MAGIC & 0xFFFFFFFF) * DESCRIPTOR_FACTOR & 0xFFFFFFFF
    return (mixed ^ mixed >> 15) * DESCRIPTOR_FACTOR


_MIXED_ZEROS = [_mixed(i, 0) for i in range(15)]  # most words of most descriptors


STRUCTS = {
    "Shape": Shape,
    "RankParams": RankParams,
    "LaunchParams": LaunchParams,
    "Descriptor": Descriptor,
    "Sampling": Sampling,
    "TokenRecord": TokenRecord,
    "TraceEvent": TraceEvent,
    "FaultRecord": FaultRecord,
    "ProbeJob": ProbeJob,
    "MailboxHeader": MailboxHeader,
    "Mailbox": Mailbox,
}
ENUMS = (Phase, Wait, Command, Record, Finish, Draw, Strategy, Mark, Probe)
CONSTANTS = (
    "MAX_RANKS MAX_ROWS FEW_ROWS MAX_SLOTS MAX_SPLITS MAX_STAGES STAGE_BYTES TILE_K UNIT_ROWS CHUNK MAX_HEAD_DIM MERGE_EXTRA "
    "CONSUMER_WARPS ADDER_WARPS TRACE_WRITERS ALIGN_ROUNDS ALIGN_EVERY ALIGN_SLOTS NUM_WARPS PART_SLOTS MAX_STOP_IDS "
    "PLAN_HEADER_WORDS PLAN_ROW_WORDS SAMPLING_WORDS MAX_LOGPROBS SEARCH_PIVOTS SEARCH_ROUNDS DRAW_ROW_BYTES "
    "SHARED_HEADER_BYTES DESCRIPTOR_SLOTS RECORD_SLOTS TOKEN_FROM_ROW ROW_SAMPLES ROW_DRAWS ROW_SLOT TRACE_CUT PLAN_ALIGNS PLAN_NEW_PAGES "
    "DESCRIPTOR_MAGIC DESCRIPTOR_FACTOR"
).split()
