"""Resets objects that own threads, sockets, descriptors or processes in a forked child.

A child has a copy of every object and none of its parent's threads. It shares sockets, pipes and the event loop's epoll
with its parent, so using them in the child affects the parent. Owners register here; in a child each of them drops its
resources and returns to its state before the first use.
"""

from __future__ import annotations

import os
import weakref
from typing import Any, Final, Protocol


class Owner(Protocol):
    """An object with resources that a forked child must not use."""

    def forget_parent(self) -> None:
        """Called in a forked child before other code runs: drop the parent's resources without using them."""


generation = 0  # forks since this module was imported; cheaper to read than a process id

_owners: Final[weakref.WeakSet[Any]] = weakref.WeakSet()
_kept: Final[list[object]] = []


def register(owner: Owner) -> None:
    """Call `owner.forget_parent()` in each child that is forked while `owner` lives."""
    _owners.add(owner)


def keep_for_ever(*inherited: object) -> None:
    """Keep these objects of the parent alive in the child: only the parent may run their finalizers."""
    _kept.extend(inherited)


def _forget_parent() -> None:
    global generation
    generation += 1
    for owner in list(_owners):
        owner.forget_parent()


os.register_at_fork(after_in_child=_forget_parent)
