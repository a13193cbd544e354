"""Free slots and KV pages. All of a request's pages are reserved at admission, so nothing running is ever evicted."""

from __future__ import annotations


class FreeList:
    """Integers 0 … count-1, taken all or nothing and given back."""

    def __init__(self, count: int, what: str):
        self.count = count
        self._what = what
        self._free = list(range(count - 1, -1, -1))  # the lowest comes first
        self._taken = [False] * count

    def __len__(self) -> int:
        """How many are free."""
        return len(self._free)

    def take(self, number: int) -> list[int] | None:
        """`number` of them, or None when fewer are free."""
        if number > len(self._free):
            return None
        taken = [self._free.pop() for _ in range(number)]
        for item in taken:
            self._taken[item] = True
        return taken

    def give(self, items: list[int]) -> None:
        """Returns what `take` gave; anything else is a bug of ours."""
        for item in items:
            assert self._taken[item], f"{self._what} {item} was given back twice"
            self._taken[item] = False
            self._free.append(item)


def pages_needed(prompt_len: int, max_tokens: int, page_size: int) -> int:
    """KV pages that hold a prompt and everything that may be generated from it."""
    return -(-(prompt_len + max_tokens) // page_size)
