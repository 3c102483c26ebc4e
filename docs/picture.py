"""Draw terminal.svg: a terminal in which the example was just trained, for `make picture`."""

import sys
from html import escape
from pathlib import Path
from tempfile import TemporaryDirectory

import pyte

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))

from bakery import bake, environment, in_terminal

COLUMNS, COMMAND = 124, "python main.py fit --config configs/digits.yaml"
WIDTH, HEIGHT, MARGIN = 7.83, 19, 16  # pixels: of a character at size 13, of a line, around them


def trained() -> list[str]:
    """The lines of the screen when the command has ended."""
    with TemporaryDirectory() as folder:
        project = bake(Path(folder), Path(folder))
        environ = environment(Path(folder) / "e") | {"WANDB_MODE": "offline"}
        printed = in_terminal(COMMAND.split()[1:], project, environ, COLUMNS)
    screen = pyte.Screen(COLUMNS, 40)
    pyte.Stream(screen).feed(printed)
    return "\n".join(screen.display).rstrip().splitlines()


def draw(lines: list[str]) -> str:
    """The lines as a picture, the word with which each begins in another colour."""
    rows = []
    for number, line in enumerate(line.rstrip() for line in lines):
        label, text = "", line
        if line[:1].isalpha() and line[8:9] == " ":
            label, text = line[:9], line[9:]
        spans = f'<tspan fill="#7aa2f7">{escape(label)}</tspan>{escape(text)}'
        spans = spans.replace("  ", 2 * "\N{NO-BREAK SPACE}")
        top = MARGIN + HEIGHT * number + 14
        rows.append(f'<text x="{MARGIN}" y="{top}" xml:space="preserve">{spans}</text>')
    width, height = 2 * MARGIN + WIDTH * max(map(len, lines)), 2 * MARGIN + HEIGHT * len(lines)
    return "\n".join(
        [
            f'<svg xmlns="http://www.w3.org/2000/svg" width="{width:.0f}" height="{height}"'
            ' font-family="Menlo, Consolas, DejaVu Sans Mono, monospace"'
            ' font-size="13" fill="#d5d9e0">',
            '<rect width="100%" height="100%" rx="8" fill="#1a1b26"/>',
            *rows,
            "</svg>\n",
        ]
    )


if __name__ == "__main__":
    Path(__file__).with_name("terminal.svg").write_text(
        draw([f"$ {COMMAND}", *trained()]), encoding="utf-8"
    )
