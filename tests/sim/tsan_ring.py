"""Run by test_tsan.py under ThreadSanitizer: `lanes [define …]` of the ring, round robin."""

import sys

from tests.sim import ring

if __name__ == "__main__":
    r = ring.make(int(sys.argv[1]), defines=tuple(sys.argv[2:]), rows=3, tsan=True, deadline_us=100_000)
    print("right" if r.run().right() else "wrong")
