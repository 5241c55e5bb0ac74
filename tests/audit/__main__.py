"""`make audit`: what every shipped configuration compiles to, and whether it may ship. Exits 1 if one may not.

PYTHONPATH=tests python -m audit --arch sm_90 --dtype bf16 --kernel block_grad
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from collections import defaultdict
from pathlib import Path

from .rules import Record, broken_rules
from .run import KERNELS, run_audit, tasks


def main() -> int:
    parser = argparse.ArgumentParser("audit", description=(__doc__ or "").partition("\n")[0])
    for name in ("--arch", "--kernel", "--dtype"):
        parser.add_argument(name, action="append", default=[], help="repeatable; all if absent")
    parser.add_argument(
        "--extent", choices=("smoke", "shipped", "every"), default="shipped", help="see tasks"
    )
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1, help="processes; one per core")
    parser.add_argument("--full", action="store_true", help="a line per configuration")
    parser.add_argument("--json", type=Path, help="write every record")
    parser.add_argument("--registry", default=KERNELS, help=argparse.SUPPRESS)
    given = parser.parse_args()
    try:
        work = tasks(given.arch, given.kernel, given.dtype, extent=given.extent, registry=given.registry)
    except ValueError as error:
        parser.error(str(error))
    start, records = time.monotonic(), []
    for record in run_audit(work, given.jobs):
        records.append(record)
        if sys.stderr.isatty():
            print(f"\rcompiling {len(records)}/{len(work)}", end="", file=sys.stderr, flush=True)
    records.sort(key=lambda record: record.name)
    groups: dict[tuple[str, str, str], list[Record]] = defaultdict(list)
    for record in records:
        groups[record.kernel, record.arch, record.dtype].append(record)
        if given.full:
            print(f"{record.name}: {_figures([record])}")
    for group, found in groups.items():
        print(f"{' '.join(group)}: {_figures(found)}")
    broken = {record.name: rules for record in records if (rules := broken_rules(record))}
    for name, rules in broken.items():
        print(f"BROKEN {name}: {'; '.join(rules)}")
    seconds = time.monotonic() - start
    print(f"{len(records)} compilations in {seconds:.0f} s, {len(broken)} break a rule.")
    if given.json is not None:
        plain = [{**record.to_json(), "broken_rules": broken.get(record.name, ())} for record in records]
        given.json.write_text(json.dumps(plain, indent=1))
    return bool(broken)


def _figures(records: list[Record]) -> str:
    """Ranges over configurations and forms."""
    registers, shared = ([getattr(r, name) for r in records] for name in ("registers", "shared"))
    cores = sorted({core for r in records for core in r.tensor_cores})
    return (
        f"{sum(not broken_rules(r) for r in records)}/{len(records)} pass, {min(registers)}-{max(registers)} "
        f"registers, {min(shared) >> 10}-{max(shared) >> 10} KiB shared, {' '.join(cores) or 'no tensor cores'}"
    )


if __name__ == "__main__":
    sys.exit(main())
