"""Tables of ``bench`` and ``tune``."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from rich.table import Table
from rich.text import Text

from cospadi_cli.render import console, size

if TYPE_CHECKING:
    from cospadi.backends import Tuned
    from cospadi.evaluation.speed import Crossover

_COLUMNS = (
    "spread: distance of the quartiles; vs: how many times faster than the dense product of torch and than the "
    "hand-written one; extra: what backend and call take besides the stored bytes; peak: of the measured bandwidth."
)


def show_layers(figures: dict[str, Any]) -> None:
    """Show what ``bench`` found of layers, one table per layer and dtype."""
    screen, rows, rates = console(), figures["rows"], figures["rates"]
    _show_machine(figures)
    products = ", ".join(f"{rate / 1e9:.0f} GFLOP/s in {dtype}" for dtype, rate in rates["products"].items())
    screen.print(f"memory {rates['bandwidth'] / 1e9:.1f} GB/s, products of torch {products}")
    for layer, dtype in dict.fromkeys((row["layer"], row["dtype"]) for row in rows):
        mine = [row for row in rows if (row["layer"], row["dtype"]) == (layer, dtype)]
        first = mine[0]
        title = f"\n{layer}: {first['n_atoms']} atoms, {first['n_nonzero']} non-zeros, values {first['value_dtype']}"
        screen.print(Text(f"{title}, inputs {dtype}", style="bold"))
        screen.print(_layer_table(mine))
    screen.print()
    for one in figures["dispatch"]:
        screen.print(
            f"Module and operator around {one['backend']} add {one['overhead']:.1f} µs to its {one['multiply']:.1f} µs "
            f"(one token, {one['layer']}, {one['dtype']}, weights in cache).",
            markup=False,
        )
    for name, reason in figures["chosen"].items():
        screen.print(f"{name}: {reason}", style="dim", markup=False)
    small = dict.fromkeys(r["layer"] for r in rows if r["copies"] * r["stored_bytes"] <= 2 * rates["cache_bytes"])
    if small:
        screen.print(f"The copies of {', '.join(small)} are less than twice the cache: partly warm.", markup=False)
    for one in figures["skipped"]:
        screen.print(f"Not measured: {one['backend']} in {one['dtype']} ({one['reason']})", style="dim", markup=False)
    screen.print(f"{_COLUMNS} Measured: {figures['method']}.", style="dim", markup=False)


def show_model(figures: dict[str, Any]) -> None:
    """Show what ``bench MODEL`` found."""
    screen, settings = console(), figures["settings"]
    _show_machine(figures)
    table = _table("layers", "dtype", "prefill tok/s", "vs dense", "decode tok/s", "vs dense", "weights", "peak", "")
    for row in figures["rows"]:
        table.add_row(
            row["contender"],
            row["dtype"],
            _with_spread(row, "prefill"),
            f"x{row['times_prefill']:.2f}",
            _with_spread(row, "decode"),
            f"x{row['times_decode']:.2f}",
            size(row["weight_bytes"]),
            "-" if row["peak_bytes"] is None else size(row["peak_bytes"]),
            Text(row["verdict"], style="red"),
        )
    screen.print(table)
    tokens = f"prompt of {settings['prompt_tokens']} tokens, {settings['new_tokens']} written"
    screen.print(f"Dense: {figures['baseline']}. Attention {figures['attention']} for all; {tokens}.", markup=False)
    for name, reason in figures["chosen"].items():
        screen.print(f"{name}: {reason}", style="dim", markup=False)
    screen.print(f"Measured: {figures['method']}.", style="dim", markup=False)


def show_crossovers(found: "Sequence[Crossover]") -> None:
    """Show how much faster than dense products the kernels were, by number of tokens."""
    for one in found:
        factors = "  ".join(f"{n}: x{factor:.2f}" for n, factor in one.advantage.items())
        console().print(f"{one.backend} {one.dtype}, kernel against dense product by tokens: {factors}", markup=False)


def show_tuned(entries: "Sequence[Tuned]") -> None:
    """Show the stored thresholds."""
    screen = console()
    if not entries:
        screen.print("Nothing is stored: the shipped thresholds are taken. Measure with: cospadi-cli tune")
        return
    table = _table("backend", "dtype", "up to so many tokens", "device", "threads", "torch", "cospadi", right=False)
    for one in entries:
        options = ", ".join(f"{name}={value}" for name, value in one.options.items())
        cells = (one.backend, one.dtype, options, one.device, str(one.threads or "-"), one.torch, one.cospadi)
        table.add_row(*(Text(cell) for cell in cells))
    screen.print(table)


def _layer_table(rows: list[dict[str, Any]]) -> Table:
    modes = {row["mode"] for row in rows}
    names = ("tokens", "product", "µs", "spread", "vs torch", "vs own", "bytes", "extra", "GB/s", "peak", "error", "")
    table = _table(*names)
    last = None
    for row in rows:
        name = row["contender"] if len(modes) == 1 else f"{row['contender']}, {row['mode']}"
        table.add_row(
            str(row["n_tokens"]) if row["n_tokens"] != last else "",
            Text(name),
            f"{row['microseconds']:.1f}",
            f"{(row['high'] - row['low']) / row['microseconds']:.0%}",
            _times(row["times_dense"]),
            _times(row["times_handwritten"]),
            size(row["stored_bytes"]),
            size(row["extra_bytes"] + row["scratch_bytes"]),
            f"{row['gigabytes_per_second']:.1f}",
            f"{row['bandwidth_fraction']:.0%}",
            f"{row['relative_error']:.1e}",
            Text(row["verdict"], style="red"),
        )
        last = row["n_tokens"]
    return table


def _show_machine(figures: dict[str, Any]) -> None:
    machine = figures["machine"]
    where = machine["gpu"] if figures["settings"]["device"].startswith("cuda") else machine["processor"]
    threads = f"{machine['threads']} threads, torch {figures['versions']['torch']}"
    console().print(f"{where}, {threads}", markup=False)


def _with_spread(row: dict[str, Any], part: str) -> str:
    return f"{row[f'{part}_tokens_per_second']:.1f} ({row[f'{part}_low']:.1f}-{row[f'{part}_high']:.1f})"


def _times(factor: float | None) -> str:
    return "-" if factor is None else f"x{factor:.2f}"


def _table(*columns: str, right: bool = True) -> Table:
    table = Table(box=None, header_style="bold", pad_edge=False, padding=(0, 1, 0, 0))
    for index, name in enumerate(columns):
        # The first two columns and the last one are words.
        number = right and 1 < index < len(columns) - 1
        table.add_column(name, justify="right" if number else "left", overflow="fold")
    return table
