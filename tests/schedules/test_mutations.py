"""Every planted bug is caught by whom docs/schedules.md says. A few of them here, all with IMEX_FULL=1 (or make test-full)."""

from __future__ import annotations

import os
import re

import pytest

from imex_persist.device import hostcc
from imex_persist.errors import DeviceError

from . import hunt
from .mutations_across import MUTATIONS, QUICK

pytestmark = pytest.mark.timeout(600)
FULL = bool(os.environ.get("IMEX_FULL"))


@pytest.fixture(autouse=True, scope="module")
def compiler():
    try:
        if "g++" not in hostcc.find_compiler().command[0]:
            pytest.skip("needs g++")
    except DeviceError as error:
        pytest.skip(str(error))


@pytest.mark.parametrize("name", [pytest.param(n, marks=[] if FULL or n in QUICK else pytest.mark.full) for n in MUTATIONS])
def test_mutation(name):
    mutation = MUTATIONS[name]
    assert hunt.hunt(name, mutation.by), f"{name} ({mutation.breaks}) got past: {mutation.by}"


def test_every_mutation_is_in_the_table():
    text = (hunt.ROOT / "docs" / "schedules.md").read_text()
    listed = re.findall(r"^\| `(\w+)` \|(?!.*nobody)", text, re.MULTILINE)
    assert sorted(listed) == sorted(MUTATIONS)


def test_every_patch_still_fits(tmp_path):
    for mutation in MUTATIONS.values():
        mutation.apply(tmp_path)
