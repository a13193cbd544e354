"""What a user would take instead, on the same shapes and cards in the same run: each peer is a process of its own, torch or vLLM's."""
