"""Memory of linear_loss on TPUs that are not there, its vocabulary split over all of them, beside the plain form's."""

from rich.console import Console
from rich.table import Table

from pallas_kernels.measure.loss_forms import FORMS, Size
from pallas_kernels.measure.static_cost_tpu import chip_of, compiled_in_child


def report(topology: str, tokens: int, vocab: int, width: int) -> None:
    """Compiles every loss in both forms, in a process of its own, and prints the table."""
    chip_of(topology)
    size = Size(tokens, vocab, width)
    temporary = compiled_in_child({"operation": "linear_loss", "topology": topology, **vars(size)}, "")
    if temporary is None:
        raise RuntimeError(f"static_cost: the compiler aborted on linear_loss for {topology}.")
    title = (
        f"linear_loss on {topology}, {tokens} tokens, vocabulary {vocab} over all devices, width {width}, bfloat16: "
        "temporary MiB of one device for value and gradients"
    )
    table = Table(title=title, title_justify="left")
    for name in ("", *FORMS, "plain / sliced"):
        table.add_column(name, justify="right" if name else "left")
    for loss, of in temporary.items():
        table.add_row(loss, *(f"{of[form] / 2**20:.0f}" for form in FORMS), f"{of['plain'] / of['sliced']:.1f}x")
    Console(width=max(120, Console().width)).print(table)
