"""Resets objects that own threads, sockets, descriptors or processes in a forked child.

A child has a copy of every object and none of its parent's threads. It shares sockets, pipes and the event loop's epoll
with its parent, so whatever it does to them happens to the parent. Owners register here; in a child each of them drops
what it owned and returns to its state before the first use.
"""

from __future__ import annotations

import os
import weakref
from typing import Any, Final, Protocol


class Owner(Protocol):
    """Owns something that a forked child must not use."""

    def forget_parent(self) -> None:
        """Called in a forked child before other code runs: drop what is the parent's without touching it."""


generation = 0  # how many forks lie between this process and the one that imported this; cheaper than a process id

_owners: Final[weakref.WeakSet[Any]] = weakref.WeakSet()
_kept: Final[list[object]] = []


def register(owner: Owner) -> None:
    """Have `forget_parent` called in children that are forked while `owner` lives."""
    _owners.add(owner)


def keep_for_ever(*inherited: object) -> None:
    """Never destroy these objects of the parent in the child: that would run code that is meant for the parent."""
    _kept.extend(inherited)


def _forget_parent() -> None:
    global generation
    generation += 1
    for owner in list(_owners):
        owner.forget_parent()


os.register_at_fork(after_in_child=_forget_parent)
