"""Draw terminal.svg: a terminal in which the example was just trained, for `make picture`."""

import sys
from html import escape
from itertools import groupby
from pathlib import Path
from tempfile import TemporaryDirectory

import pyte

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))

from bakery import bake, environment, in_terminal

COLUMNS, COMMAND = 100, "python main.py fit --config configs/digits.yaml"
WIDTH, HEIGHT, MARGIN = 7.83, 19, 16  # pixels: of a character at size 13, of a line, around them


COLOURS = {"cyan": "#7aa2f7", "green": "#9ece6a"}  # of the terminal, as a picture has them
Piece = tuple[str, str]  # a colour of the terminal, and a text that has it


def trained() -> list[list[Piece]]:
    """The lines of the screen when the command has ended, in pieces of one colour."""
    with TemporaryDirectory() as folder:
        project = bake(Path(folder), Path(folder))
        environ = environment(Path(folder) / "e") | {"WANDB_MODE": "offline"}
        printed = in_terminal(COMMAND.split()[1:], project, environ, COLUMNS)
    screen = pyte.Screen(COLUMNS, 40)
    pyte.Stream(screen).feed(printed)
    rows = []
    for number, text in enumerate(screen.display):
        characters = [screen.buffer[number][column] for column in range(len(text.rstrip()))]
        groups = groupby(characters, key=lambda character: character.fg)
        rows.append([(colour, "".join(one.data for one in group)) for colour, group in groups])
    while not rows[-1]:
        rows.pop()
    return rows


def draw(lines: list[list[Piece]]) -> str:
    """The lines as a picture."""
    rows = []
    for number, pieces in enumerate(lines):
        spans = ""
        for colour, text in pieces:
            shown = escape(text).replace("  ", 2 * "\N{NO-BREAK SPACE}")
            fill = COLOURS.get(colour)
            spans += f'<tspan fill="{fill}">{shown}</tspan>' if fill else shown
        top = MARGIN + HEIGHT * number + 14
        rows.append(f'<text x="{MARGIN}" y="{top}" xml:space="preserve">{spans}</text>')
    longest = max(sum(len(text) for _, text in pieces) for pieces in lines)
    width, height = 2 * MARGIN + WIDTH * longest, 2 * MARGIN + HEIGHT * len(lines)
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
        draw([[("default", f"$ {COMMAND}")], *trained()]), encoding="utf-8"
    )
