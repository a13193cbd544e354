"""Tests that need torch and transformers (extra `oracle`); `make test-oracle` runs them, `make test` does not."""

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))  # oracle_models, whatever pytest's import mode
pytest.importorskip("torch")
pytest.importorskip("transformers")
