"""`imex-persist bench`: every time beside its bound, measured in the same run on the same cards, and beside what others offer."""
