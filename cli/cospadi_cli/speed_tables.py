"""Tables of ``bench`` and ``tune``."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

from rich.table import Table
from rich.text import Text

from cospadi_cli.console import console, make_table, size

if TYPE_CHECKING:
    import torch

    from cospadi.backends import Tuned
    from cospadi.evaluation.speed import Crossover, LayerFigures, LayerRow, ModelFigures
    from cospadi.reporting import Machine

_COLUMNS = (
    "spread: distance of the quartiles; vs torch, vs own: how many times faster than the dense product of torch and "
    "than the hand-written one; extra: memory of backend and call besides the stored bytes; peak: fraction of the "
    "measured bandwidth."
)


def show_layers(figures: "LayerFigures", machine: "Machine") -> None:
    """Show figures of layers, one table per layer and dtype."""
    screen, rows, rates = console(), figures.rows, figures.rates
    _show_machine(machine, figures.settings.device)
    products = ", ".join(f"{rate / 1e9:.0f} GFLOP/s in {dtype}" for dtype, rate in rates.products.items())
    screen.print(f"memory {rates.bandwidth / 1e9:.1f} GB/s, products of torch {products}")
    for layer, dtype in dict.fromkeys((row.layer, row.dtype) for row in rows):
        mine = [row for row in rows if (row.layer, row.dtype) == (layer, dtype)]
        first = mine[0]
        title = f"\n{layer}: {first.n_atoms} atoms, {first.n_nonzero} non-zeros, values {first.value_dtype}"
        screen.print(Text(f"{title}, inputs {dtype}", style="bold"))
        screen.print(_layer_table(mine))
    screen.print()
    for one in figures.dispatch:
        screen.print(
            f"Module and operator around {one.backend} add {one.overhead:.1f} µs to its {one.multiply:.1f} µs "
            f"(one token, {one.layer}, {one.dtype}, weights in cache).",
            markup=False,
        )
    _show_chosen(figures.chosen)
    warm = dict.fromkeys(row.layer for row in rows if row.copies * row.stored_bytes <= 2 * rates.cache_bytes)
    if warm:
        screen.print(f"The copies of {', '.join(warm)} are less than twice the cache: partly warm.", markup=False)
    for skipped in figures.skipped:
        text = f"Not measured: {skipped.backend} in {skipped.dtype} ({skipped.reason})"
        screen.print(text, style="dim", markup=False)
    screen.print(f"{_COLUMNS} Measured: {figures.method}.", style="dim", markup=False)


def show_model(figures: "ModelFigures", machine: "Machine") -> None:
    """Show figures of whole models."""
    screen, settings = console(), figures.settings
    _show_machine(machine, settings.device)
    columns = ("layers", "dtype", "prefill tok/s", "vs dense", "decode tok/s", "vs dense", "weights", "peak", "")
    table = make_table(*columns, left=("layers", "dtype", ""), gap=1)
    for row in figures.rows:
        table.add_row(
            row.contender,
            row.dtype,
            f"{row.prefill_tokens_per_second:.1f} ({row.prefill_low:.1f}-{row.prefill_high:.1f})",
            f"x{row.times_prefill:.2f}",
            f"{row.decode_tokens_per_second:.1f} ({row.decode_low:.1f}-{row.decode_high:.1f})",
            f"x{row.times_decode:.2f}",
            size(row.weight_bytes),
            "-" if row.peak_bytes is None else size(row.peak_bytes),
            Text(row.verdict, style="red"),
        )
    screen.print(table)
    tokens = f"prompt of {settings.prompt_tokens} tokens, {settings.new_tokens} generated"
    screen.print(f"Dense: {figures.baseline}. Attention {figures.attention} for all; {tokens}.", markup=False)
    _show_chosen(figures.chosen)
    screen.print(f"Measured: {figures.method}.", style="dim", markup=False)


def show_crossovers(found: "Sequence[Crossover]") -> None:
    """Show how much faster than dense products the kernels were, by number of tokens."""
    for one in found:
        factors = "  ".join(f"{n}: x{factor:.2f}" for n, factor in one.advantage.items())
        console().print(f"{one.backend} {one.dtype}, kernel against dense product by tokens: {factors}", markup=False)


def show_tuned(entries: "Sequence[Tuned]") -> None:
    """Show the stored thresholds."""
    screen = console()
    if not entries:
        screen.print("Nothing is stored: the shipped thresholds are used. Measure with: cospadi-cli tune")
        return
    columns = ("backend", "dtype", "thresholds in tokens", "device", "threads", "torch", "cospadi")
    table = make_table(*columns, left=columns, gap=1)
    for one in entries:
        options = ", ".join(f"{name}={value}" for name, value in one.options.items())
        cells = (one.backend, one.dtype, options, one.device, str(one.threads or "-"), one.torch, one.cospadi)
        table.add_row(*(Text(cell) for cell in cells))
    screen.print(table)


def _layer_table(rows: "list[LayerRow]") -> Table:
    modes = {row.mode for row in rows}
    columns = ("tokens", "product", "µs", "spread", "vs torch", "vs own", "bytes", "extra", "GB/s", "peak", "error", "")
    table = make_table(*columns, left=("tokens", "product", ""), gap=1)
    last = None
    for row in rows:
        table.add_row(
            str(row.n_tokens) if row.n_tokens != last else "",
            Text(row.contender if len(modes) == 1 else f"{row.contender}, {row.mode}"),
            f"{row.microseconds:.1f}",
            f"{(row.high - row.low) / row.microseconds:.0%}",
            _times(row.times_dense),
            _times(row.times_handwritten),
            size(row.stored_bytes),
            size(row.extra_bytes + row.scratch_bytes),
            f"{row.gigabytes_per_second:.1f}",
            f"{row.bandwidth_fraction:.0%}",
            f"{row.relative_error:.1e}",
            Text(row.verdict, style="red"),
        )
        last = row.n_tokens
    return table


def _show_machine(machine: "Machine", device: "torch.device") -> None:
    import torch

    where = machine["gpu"] if device.type == "cuda" else machine["processor"]
    console().print(f"{where}, {machine['threads']} threads, torch {torch.__version__}", markup=False)


def _show_chosen(chosen: dict[str, str]) -> None:
    for name, reason in chosen.items():
        console().print(f"{name}: {reason}", style="dim", markup=False)


def _times(factor: float | None) -> str:
    return "-" if factor is None else f"x{factor:.2f}"
