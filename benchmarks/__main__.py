"""`make bench`: every row of the table, with the ratio that is asked for; exits with 1 when one is missed.

`python -m benchmarks fold rounds` measures those alone.
"""

from __future__ import annotations

import sys

from rich.console import Console
from rich.table import Table

from . import alignment, crowd, fold, keeping, memory, methods, posterior, recovery, rounds, statistics, widths

BENCHMARKS = {
    benchmark.__name__.rpartition(".")[2]: benchmark
    for benchmark in (fold, memory, statistics, posterior, alignment, widths, methods, keeping, crowd, recovery, rounds)
}

if unknown := {*sys.argv[1:]} - BENCHMARKS.keys():
    raise SystemExit(f"no benchmark {', '.join(sorted(unknown))}: choose from {', '.join(BENCHMARKS)}")
console = Console(width=150)
table = Table("work", "beside", "ratio", "asked", "met", "detail")
met = True
for benchmark in (BENCHMARKS[name] for name in sys.argv[1:] or BENCHMARKS):
    with console.status(benchmark.__name__):
        for row in benchmark.rows():
            console.print(f"{row.work} / {row.beside}: {row.ratio:.2f}", highlight=False)
            table.add_row(row.work, row.beside, f"{row.ratio:.2f}", row.asked, "yes" if row.met else "NO", row.detail)
            met &= row.met
console.print(table)
raise SystemExit(0 if met else 1)
