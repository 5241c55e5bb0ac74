"""`make audit`: compiles every shipped configuration and checks that it may ship. Exits 1 if one may not.

It does not compile kernels that are listed as passed (passed.py), except a sample.

PYTHONPATH=tests python -m audit --arch sm_90 --kernel contract
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from dataclasses import asdict
from pathlib import Path

from smoa_kernels.checks import check_choices
from smoa_kernels.definition.precision import KERNEL_PRECISIONS

from . import passed
from .rules import broken_rules
from .run import prepare, run_audit, sample, tasks


def main() -> int:
    parser = argparse.ArgumentParser("audit", description=(__doc__ or "").partition("\n")[0])
    for name in ("--arch", "--kernel", "--dtype"):
        parser.add_argument(name, action="append", default=[], help="repeatable; all if absent")
    parser.add_argument("--all", action="store_true", help="also compile kernels that are listed as passed")
    parser.add_argument(
        "--sample", action="store_true", help="compile a sample alone; say what is not listed"
    )
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1, help="processes; one per core")
    parser.add_argument("--json", type=Path, help="write the records of what was compiled")
    given = parser.parse_args()
    try:
        check_choices("--dtype", given.dtype, KERNEL_PRECISIONS)
        work = tasks(given.arch, given.kernel)
    except ValueError as error:
        parser.error(str(error))
    start, listed = time.monotonic(), passed.read(passed.FOLDER)
    blanks = {task: prepare(task)[2] for task in work}
    lines = passed.lines_of(blanks.values())
    new = {name for name, line in lines.items() if listed.get(name) != line}
    print(f"Triton {passed.VERSION}, not listed as passed: {', '.join(sorted(new)) or 'nothing'}", flush=True)
    again, names = sample(work), lines if given.all else () if given.sample else new
    asked = [task for task in work if blanks[task].group in names and task not in again]
    work = again + [task for task in asked if not given.dtype or task.dtype in given.dtype]
    print(f"Compiling {len(work)} of {len(blanks)} forms, {len(again)} of them a sample.", flush=True)
    records, broken = [], {}
    try:
        for record in run_audit(work, given.jobs):
            records.append(record)
            if rules := broken_rules(record):
                broken[record.name] = rules
                print(f"BROKEN {record.name}: {'; '.join(rules)}", flush=True)
            if sys.stderr.isatty():
                print(f"\rcompiling {len(records)}/{len(work)}", end="", file=sys.stderr, flush=True)
    finally:  # Ctrl-C keeps the complete records
        passed.update(passed.FOLDER, lines, records)
    seconds = time.monotonic() - start
    print(f"{len(records)} forms in {seconds:.0f} s, {len(broken)} break a rule.")
    if given.json is not None:
        plain = [{**asdict(record), "broken_rules": broken.get(record.name, ())} for record in records]
        given.json.write_text(json.dumps(plain, indent=1))
    return bool(broken)


if __name__ == "__main__":
    sys.exit(main())
