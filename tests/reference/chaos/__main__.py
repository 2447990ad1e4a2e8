"""`python -m tests.reference.chaos CONFIG`: exit status 0 if every answer was equal and nothing is left held."""

from __future__ import annotations

import argparse
import sys
import tempfile
from pathlib import Path

from tests.reference.chaos.run import Plan, run


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.reference.chaos", description=__doc__)
    parser.add_argument("config", type=Path, help="a TOML file; the model must be small and run in float32 on the CPU")
    parser.add_argument("--kills", type=int, default=100)
    parser.add_argument("--hangs", type=int, default=10)
    parser.add_argument("--seconds", type=float, default=500.0, help="for the kills (default 500)")
    parser.add_argument(
        "--kill-every", type=float, help="seconds between two kills; then --kills follows from --seconds"
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--streams", type=int, default=64)
    parser.add_argument("--batch", type=int, default=200)
    parser.add_argument("--http", type=int, default=4, help="HTTP streams beside the others (default 4)")
    parser.add_argument("--roles", nargs="*", default=(), help="what is hit (default: all)")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="of the engine's configuration")
    parser.add_argument("--log", type=Path, help="the engine's log (default: a new file)")
    options = parser.parse_args()
    num_kills = int(options.seconds / options.kill_every) if options.kill_every else options.kills
    plan = Plan(
        num_kills, options.hangs, options.seconds, options.seed, options.kill_every, options.streams, options.batch,
        options.http, tuple(options.roles),
    )  # fmt: skip
    log = options.log or Path(tempfile.mkstemp(prefix="chaos-", suffix=".log")[1])
    print(f"seed {plan.seed}; the engine's log: {log}", flush=True)
    result = run(options.config, plan, options.set, log)
    print(result)
    return 1 if result.faulty else 0


if __name__ == "__main__":
    sys.exit(main())
