"""docs/options.md from the fields of a request, from which the command line is made too.

python docs/make_options.py
"""

from __future__ import annotations

from pathlib import Path

from svdconvert.settings.options import EVERY
from svdconvert.settings.row import Option

PAGE = Path(__file__).with_name("options.md")

_HEAD = """# Options of a conversion

Every option of `svdconvert convert` and its keyword in Python, made from the fields of the request by
`make pages`. `plan`, `options`, `calibrate`, `spectrum` and `sweep` take those that concern them, as `--help`
shows; [commands](commands.md) has an overview. Under Healing, those whose names begin with
`--heal` are of a conversion, and the others of `svdconvert heal`.
"""
# Their values lie in an object that is the keyword `calibration`.
_CALIBRATION = "calibration."
# What stands for a value where a row does not say it.
_PLACES = {"whole": "N", "count": "N", "number": "X", "folder": "FOLDER", "path": "FOLDER", "method": "METHOD"}


def main() -> None:
    """Write the page."""
    PAGE.write_text(page(), encoding="utf-8")


def page() -> str:
    """The page's text."""
    groups: dict[str, list[Option]] = {}
    for setting in EVERY.values():
        groups.setdefault(setting.option.group, []).append(setting.option)
    parts = [_HEAD]
    for title, rows in groups.items():
        lines = ["| option | in Python | default | what it does |", "|---|---|---|---|", *map(line, rows)]
        parts.append(f"## {title}\n\n" + "\n".join(lines) + "\n")
    return "\n".join(parts)


def line(row: Option) -> str:
    """A row of the table."""
    place = row.metavar or "|".join(row.words) or _PLACES.get(row.kind, "TEXT")
    option = row.flag if row.kind == "flag" else f"{row.flag} {place}"
    keyword = f"{row.keyword}=False" if row.default is True else row.keyword
    if keyword.startswith(_CALIBRATION):
        keyword = f"calibration=Calibration({keyword.removeprefix(_CALIBRATION)}=...)"
    cells = (f"`{option}`", f"`{keyword}`", default(row), row.help)
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"


def default(row: Option) -> str:
    """The default in words."""
    if row.usual:
        return row.usual
    if row.kind == "flag":
        return "off"
    return "" if row.default in (None, ()) else f"`{row.write(row.default)[0]}`"


if __name__ == "__main__":
    main()
