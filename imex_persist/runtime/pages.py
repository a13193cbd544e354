"""KV pages: reserved whole for a running request, kept afterwards for the next one that begins with the same tokens.

A kept page is a node of a tree: its parent is the page before it, so a path from the root is the beginning of a sequence, and a node's
children are found by the page's own tokens, compared one by one (a dict compares keys when their hashes agree). Running requests hold
the nodes they share or will leave behind; a node that nobody holds is idle, and idle ones are given up, the longest unused first, when
pages run out. Shared pages are only read: a request writes from the first position that no shared page covers.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass, field

from imex_persist.runtime.allocator import FreeList, pages_needed


class Node:
    """One kept page."""

    __slots__ = ("children", "holders", "page", "parent", "tokens")

    def __init__(self, page: int, parent: Node | None, tokens: tuple[int, ...]):
        self.page, self.parent, self.tokens = page, parent, tokens
        self.children: dict[tuple[int, ...], Node] = {}
        self.holders = 0  # running requests


@dataclass(eq=False)
class Reservation:
    """A request's pages in order of its positions, and the nodes of the first of them."""

    pages: list[int]
    cached_len: int  # positions that need not be computed
    nodes: list[Node] = field(default_factory=list, repr=False)


class PagePool:
    """All pages of a KV cache. One thread uses it."""

    def __init__(self, num_pages: int, page_size: int):
        self.page_size = page_size
        self._free = FreeList(num_pages, "page")
        self._root = Node(-1, None, ())
        self._idle: OrderedDict[Node, None] = OrderedDict()  # the longest unused first; a child always before its parent

    def __len__(self) -> int:
        """Pages that a new request could have."""
        return len(self._free) + len(self._idle)

    @property
    def num_kept(self) -> int:
        """Pages that nobody holds, kept for their contents."""
        return len(self._idle)

    def reserve(self, prompt: Sequence[int], max_tokens: int, *, share: bool = True) -> Reservation | None:
        """Pages for the prompt and all that may be generated, the first of them shared where their tokens are known; None if too few
        are free. At least one position of the prompt is left to compute: its logits give the first token.
        """
        nodes = self._find(prompt) if share else []
        need = pages_needed(len(prompt), max_tokens, self.page_size) - len(nodes)
        idle = sum(node.holders == 0 for node in nodes)
        if need > len(self) - idle:
            return None
        for node in nodes:
            node.holders += 1
            self._idle.pop(node, None)
        while len(self._free) < need:
            self._give_up()
        pages = [node.page for node in nodes] + self._free.take(need)
        return Reservation(pages, len(nodes) * self.page_size, nodes)

    def keep(self, reservation: Reservation, tokens: Sequence[int]) -> None:
        """Makes the reservation's pages that `tokens` fill findable while it runs. `tokens` begin the sequence, and their keys and values
        are certainly in the pages: the kernel has handed out a token that was computed after them.
        """
        for key in self._keys(reservation, tokens):
            node = self._follow(reservation, key)
            if node.page != reservation.pages[len(reservation.nodes)]:
                break  # another request has computed the same meanwhile: its page is the one to find
            node.holders += 1
            reservation.nodes.append(node)

    def release(self, reservation: Reservation, tokens: Sequence[int] = ()) -> None:
        """The request has ended and no step touches its pages any more. Those that `tokens` (as in `keep`) fill stay, the rest is free."""
        for node in reservation.nodes:
            node.holders -= 1
        for key in self._keys(reservation, tokens):
            reservation.nodes.append(self._follow(reservation, key))
        for node in reversed(reservation.nodes):  # the last page is the first to be given up
            if not node.holders:
                self._idle[node] = None
                self._idle.move_to_end(node)
        kept = {node.page for node in reservation.nodes}
        self._free.give([page for page in reservation.pages if page not in kept])
        reservation.nodes = []

    def _keys(self, reservation: Reservation, tokens: Sequence[int]) -> list[tuple[int, ...]]:
        """The tokens of each whole page after the reservation's nodes."""
        first, size = len(reservation.nodes), self.page_size
        return [tuple(tokens[i * size : (i + 1) * size]) for i in range(first, len(tokens) // size)]

    def _follow(self, reservation: Reservation, key: tuple[int, ...]) -> Node:
        """The node after the reservation's last: one that is there, else a new one of its own page."""
        parent = reservation.nodes[-1] if reservation.nodes else self._root
        node = parent.children.get(key)
        if node is None:
            node = parent.children[key] = Node(reservation.pages[len(reservation.nodes)], parent, key)
        return node

    def _find(self, prompt: Sequence[int]) -> list[Node]:
        """The longest kept beginning of `prompt`, but its last position."""
        nodes, node, size = [], self._root, self.page_size
        for i in range((len(prompt) - 1) // size):
            node = node.children.get(tuple(prompt[i * size : (i + 1) * size]))
            if node is None:
                break
            nodes.append(node)
        return nodes

    def _give_up(self) -> None:
        node, _ = self._idle.popitem(last=False)
        assert not node.children and not node.holders, "a kept page was given up before those that follow it"
        del node.parent.children[node.tokens]
        self._free.give([node.page])
