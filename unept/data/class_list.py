"""Read class lists as people write them: names, and where they are given numbers and colors, one class per line.

    road                     a name
    traffic light 250 170 30 a name and a color r g b; commas, semicolons and brackets may stand between, as in
    sky,70,130,180           tables of a spreadsheet; or #4682b4 at the end
    3: person                a number, if all lines have one and they count from 0

Lines that begin with "# " are comments, as is the heading of a table (name, r, g, b). The id of a class is its place
among the others. Whatever could shift an id is refused, and the message names the line.
"""

import codecs
import re
from pathlib import Path
from typing import NamedTuple

from ..colors import default_palette
from .base import IGNORE_INDEX, DatasetError

Color = tuple[int, int, int]

_BREAK = r"[\s,;]+"
_COLOR = re.compile(
    rf"(?P<name>.*?){_BREAK}[(\[]?(\d+){_BREAK}(\d+){_BREAK}(\d+)[)\]]?|(\d+){_BREAK}(\d+){_BREAK}(\d+)"
)
_HEX_COLOR = re.compile(rf"(?P<name>.*?){_BREAK}#([0-9a-fA-F]{{2}})([0-9a-fA-F]{{2}})([0-9a-fA-F]{{2}})")
_HEADING = re.compile(
    rf"(?:id{_BREAK})?(?:class|label|name)\w*{_BREAK}r(?:ed)?{_BREAK}g(?:reen)?{_BREAK}b(?:lue)?", re.I
)
_NUMBER = re.compile(r"(\d+)\s*[:,;\s]\s*(\S.*)")
_TWO_NUMBERS = re.compile(rf".*\D{_BREAK}\d+{_BREAK}\d+")


class ClassList(NamedTuple):
    """The K classes of a list."""

    names: tuple[str, ...]
    palette: tuple[Color, ...]
    """A color for every class: its own, or one of `default_palette`."""
    colors: dict[Color, int]
    """The class of each color that the list gives; empty if it gives none."""


def read_class_list(path: Path) -> ClassList:
    """Read names and colors from a class list, written as the top of this file says, in UTF-8 or UTF-16.

    Raises:
        DatasetError: if the file is missing or not text, or holds no class, an empty line between classes, a name or a
            color twice, a color outside 0..255, numbers that do not count from 0, or more than 255 classes. The message
            names the line.
    """
    lines = _class_lines(path)
    if not 0 < len(lines) <= IGNORE_INDEX:
        raise DatasetError(f"{path} lists {len(lines)} classes: write 1 to {IGNORE_INDEX}, one per line")
    names: list[str] = []
    palette = list(default_palette(len(lines)))
    colors: dict[Color, int] = {}
    for k, (line, text) in enumerate(_without_numbers(lines, path)):
        name, color = _split_color(text, f"line {line} of {path}")
        if name in names:
            raise DatasetError(f"{path} lists {name!r} twice, in lines {lines[names.index(name)][0]} and {line}")
        names.append(name)
        if color is None:
            continue
        if color in colors:
            raise DatasetError(
                f"lines {lines[colors[color]][0]} and {line} of {path} give the same color {color}: each class needs "
                "its own"
            )
        palette[k] = color
        colors[color] = k
    return ClassList(tuple(names), tuple(palette), colors)


def _class_lines(path: Path) -> list[tuple[int, str]]:
    """The lines that name classes, without spaces around them, and their numbers in the file, from 1."""
    # Only these end a line: str.splitlines knows more, such as a form feed, which would shift all ids after it.
    lines = [line.strip() for line in re.split(r"\r\n|\n|\r", _read_text(path))]
    while lines and not lines[-1]:
        lines.pop()
    kept: list[tuple[int, str]] = []
    for number, line in enumerate(lines, 1):
        if line == "#" or re.match(r"#\s|##", line) or (not kept and _HEADING.fullmatch(line)):
            continue
        if line.startswith("#"):
            raise DatasetError(
                f"line {number} of {path} begins with '#': write '# ' before a comment, or another name for the class"
            )
        if not line:
            raise DatasetError(
                f"line {number} of {path} names no class: a class's id is its place, so that no line may be empty"
            )
        if not line.replace("\t", " ").isprintable():
            raise DatasetError(f"line {number} of {path} holds characters that are not text ({line!r}): remove them")
        kept.append((number, line))
    return kept


def _read_text(path: Path) -> str:
    advice = "write one class per line, `name` or `name r g b`"
    try:
        content = path.read_bytes()
        if content.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
            return content.decode("utf-16")
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = content[: error.start].count(b"\n") + 1
        raise DatasetError(f"the class list {path} can't be read: line {line} is not UTF-8 text; {advice}") from error
    except OSError as error:
        raise DatasetError(f"the class list {path} can't be read ({error.strerror}): {advice}") from error


def _without_numbers(lines: list[tuple[int, str]], path: Path) -> list[tuple[int, str]]:
    """Remove the numbers before the names if every line has one."""
    matches = [_NUMBER.fullmatch(text) for _, text in lines]
    numbered = [match for match in matches if match is not None and re.search(r"[^\W\d]", match[2])]
    if len(numbered) < len(lines):
        return lines
    for k, ((line, _), match) in enumerate(zip(lines, numbered, strict=True)):
        if int(match[1]) != k:
            raise DatasetError(
                f"line {line} of {path} numbers its class {match[1]}, but it is class {k} of the list, and ids count "
                "from 0: list the classes in the order of their ids, with a name for every id, or map the ids of the "
                "labels with --label-ids and write no numbers"
            )
    return [(line, match[2]) for (line, _), match in zip(lines, numbered, strict=True)]


def _split_color(text: str, where: str) -> tuple[str, Color | None]:
    """The name and the color in a line, which messages call `where`."""
    color: Color | None = None
    name = text
    if match := _COLOR.fullmatch(text):
        red, green, blue = (int(part) for part in match.groups()[1:] if part is not None)
        color, name = (red, green, blue), match["name"] or ""
    elif match := _HEX_COLOR.fullmatch(text):
        red, green, blue = (int(part, 16) for part in match.groups()[1:])
        color, name = (red, green, blue), match["name"]
    elif _TWO_NUMBERS.fullmatch(text):
        raise DatasetError(f"{where} ends in two numbers ({text!r}): a color has three, r g b")
    name = " ".join(name.strip(",; \t").split())
    if not name:
        raise DatasetError(f"{where} names no class: write `name` or `name r g b`")
    if color is not None and max(color) > 255:
        raise DatasetError(f"{where} gives the color {color}: r, g and b go from 0 to 255")
    return name, color
