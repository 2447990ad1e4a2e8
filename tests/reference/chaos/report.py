"""The figures of a run as text."""

from __future__ import annotations

import statistics
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Final

from tests.reference.chaos.faults import Fault
from tests.reference.chaos.idle import Footprint
from tests.reference.chaos.load import Tally

BAD: Final = ("lost", "doubled", "changed")
MiB: Final = 2**20


def percentiles(values: Sequence[float]) -> tuple[float, float]:
    """p50 and p99; not-a-number of nothing."""
    if len(values) < 2:
        return (values[0], values[0]) if values else (float("nan"), float("nan"))
    cuts = statistics.quantiles(values, n=100, method="inclusive")
    return cuts[49], cuts[98]


def table(faults: Sequence[Fault]) -> str:
    """By role: how often it was hit, and how long the streams that were open then waited for their next part."""
    lines = [f"{'process':12} {'kills':>5} {'hangs':>5} {'pause p50 s':>12} {'p99 s':>8}"]
    for role in sorted({fault.role for fault in faults}):
        hits = [fault for fault in faults if fault.role == role]
        p50, p99 = percentiles([pause for fault in hits if fault.how == "kill" for pause in fault.pauses_s])
        num = Counter(fault.how for fault in hits)
        lines.append(f"{role:12} {num['kill']:5} {num['hang']:5} {p50:12.2f} {p99:8.2f}")
    return "\n".join(lines)


def verdicts(tally: Tally) -> str:
    """How many answers were equal, lost, doubled, changed; with examples of the bad ones."""
    lines = [", ".join(f"{name}: {tally.num[name]}" for name in dict.fromkeys(("equal", *BAD, *sorted(tally.num))))]
    lines += [f"  {verdict}: {what}" for verdict, examples in tally.examples.items() for what in examples]
    return "\n".join(lines)


def growth(before: Mapping[str, Footprint], after: Mapping[str, Footprint]) -> str:
    """Memory and descriptors of every process, before and after."""
    lines = [f"{'process':12} {'memory before':>14} {'after, MiB':>11} {'descriptors':>12} {'after':>6}"]
    for name in before:
        old, new = before[name], after.get(name)
        if new is None:
            lines.append(f"{name:12} is not there")
            continue
        lines.append(
            f"{name:12} {old.memory_bytes / MiB:14.1f} {new.memory_bytes / MiB:11.1f} "
            f"{len(old.descriptors):12} {len(new.descriptors):6}"
        )
    return "\n".join(lines)


def further_descriptors(before: Mapping[str, Footprint], after: Mapping[str, Footprint]) -> list[str]:
    """The processes that have more descriptors than before, and which. An idle connection may have ended."""
    found = []
    for name in sorted(before.keys() & after.keys()):
        if more := Counter(after[name].descriptors) - Counter(before[name].descriptors):
            found.append(f"{name} has more descriptors: {dict(more)}")
    return found


def period(tally: Tally, begin: float, end: float, memory: Mapping[str, Footprint], start: float) -> str:
    """One line about a part of a long run."""
    gap = percentiles([gap for at, gap in tally.gaps_s if begin <= at < end])
    latency = percentiles([each for at, each in tally.latencies_s if begin <= at < end])
    sizes = " ".join(f"{name} {each.memory_bytes / MiB:.0f}" for name, each in memory.items())
    return (
        f"{begin - start:6.0f}-{end - start:.0f} s: between tokens p50 {gap[0] * 1e3:.0f} p99 {gap[1] * 1e3:.0f} ms, "
        f"requests p50 {latency[0]:.2f} p99 {latency[1]:.2f} s; MiB: {sizes}"
    )
