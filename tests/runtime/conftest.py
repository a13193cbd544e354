"""Fixtures: a mailbox with a fake kernel behind it, and an engine on top."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from imex_persist.runtime.engine import Engine
from imex_persist.runtime.mailbox import ArenaLayout, Mailbox
from imex_persist.runtime.shared import SharedBlock
from tests.runtime.fake_kernel import FakeKernel

PAGE = 32


@pytest.fixture
def make_box():
    """make_box(num_slots, num_pages, max_model_len) -> namespace of block, mailbox and a kernel that is not started."""
    blocks = []

    def make(num_slots: int = 2, num_pages: int = 16, max_model_len: int = 256, step_s: float = 0.0) -> SimpleNamespace:
        layout = ArenaLayout(num_slots, max_model_len, -(-max_model_len // PAGE))
        block = SharedBlock.create(layout.nbytes)
        blocks.append(block)
        mailbox = Mailbox(block.view, layout)
        kernel = FakeKernel(block.view, num_slots, num_pages, PAGE, step_s)
        return SimpleNamespace(block=block, mailbox=mailbox, kernel=kernel, layout=layout)

    yield make
    for block in blocks:
        block.close()


@pytest.fixture
def make_engine(make_box):
    """make_engine(...) -> (Engine, FakeKernel that runs); both are ended afterwards, and the kernel's findings raised."""
    made = []

    def make(num_slots: int = 2, num_pages: int = 16, max_model_len: int = 256, step_s: float = 0.0, **options):
        box = make_box(num_slots, num_pages, max_model_len, step_s)
        box.kernel.start()
        engine = Engine(
            box.mailbox, num_slots=num_slots, num_pages=num_pages, page_size=PAGE, max_model_len=max_model_len, **options
        )
        made.append((engine, box.kernel))
        return engine, box.kernel

    yield make
    for engine, kernel in made:
        engine.close()
        kernel.end()
