"""Tables in Markdown."""

from collections.abc import Callable, Iterable


def two_digits(number: float) -> str:
    return f"{number:.2f}"


def table(
    *head: str, of: Iterable[tuple[object, ...]], shown: Callable[[float], str] = two_digits
) -> str:
    """Return a table.

    Args:
        head: Names of the columns.
        of: The rows.
        shown: Makes a text of a number with a fraction.
    """
    lines = [f"| {' | '.join(head)} |", f"|{' --- |' * len(head)}"]
    for cells in of:
        texts = (shown(cell) if isinstance(cell, float) else str(cell) for cell in cells)
        lines.append(f"| {' | '.join(texts)} |")
    return "\n".join(lines)
