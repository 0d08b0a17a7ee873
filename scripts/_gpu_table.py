"""The table of what compiled kernels take, as the report and the tests print it."""

import sys
from collections.abc import Iterable

from rich import box
from rich.console import Console
from rich.table import Table

from ._gpu_cases import GPUReport


def print_table(reports: Iterable[GPUReport], versions: dict[str, str]) -> None:
    """Prints a row for each report, and by what they were compiled."""
    table = Table(box=box.MARKDOWN)
    table.add_column("case")
    table.add_column("GPU")
    for name in ("registers", "shared KiB", "spills", "copies in flight", "wgmma"):
        table.add_column(name, justify="right")
    for x in reports:
        in_flight = "none" if x.copies_in_flight is None else str(x.copies_in_flight)
        if x.fetches_apart:
            in_flight = "apart"
        table.add_row(
            *(x.case, x.architecture, str(x.registers), f"{x.shared_bytes / 2**10:.1f}"),
            *(str(x.spill_bytes), in_flight, "yes" if x.uses_wgmma else ""),
        )
    # A table that is not for a screen is not cut to one.
    console = Console(width=None if sys.stdout.isatty() else 240)
    console.print(table)
    about = ", ".join(f"{name} {version}" for name, version in versions.items())
    console.print(f"Compiled, not run. {about}")
