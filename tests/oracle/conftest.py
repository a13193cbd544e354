"""Tests that need torch and transformers (extra `oracle`); `make test-oracle` runs them, `make test` does not."""

from importlib.util import find_spec

collect_ignore_glob = [] if find_spec("torch") and find_spec("transformers") else ["test_*.py"]
