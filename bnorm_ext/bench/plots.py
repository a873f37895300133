"""Plotting a stored result of the microbenchmarks: `python -m bench.plots FILE.json FILE.png`."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

from .options import Parser, import_pictures
from .report import check_picture, read_json


def main(arguments: Sequence[str] | None = None, command: str | None = None) -> int:
    p = Parser(prog=command or f"python -m {__package__}.plots", description=__doc__)
    p.add_argument("json", type=Path, metavar="FILE.json", help="what --json wrote")
    p.add_argument("picture", type=Path, metavar="FILE.png", help="or .svg, .pdf, ...")
    options = p.parse_args(arguments)
    try:
        check_picture(options.picture, "FILE.png")
        header, rows = read_json(options.json)
        if not rows:
            raise ValueError(f"{options.json}: has no rows to draw")
        import_pictures().draw(header, rows, options.picture)
    except KeyError as missing:
        p.error(f"{options.json}: its header has no {missing}")
    except (ValueError, OSError) as error:
        p.error(str(error))
    return 0


if __name__ == "__main__":
    sys.exit(main())
