"""python -m cuda_emulator.ptx             the kinds of instructions that the interpreter knows
python -m cuda_emulator.ptx FILE ...    those in .ptx files, with how many there are
"""

from __future__ import annotations

import sys
from collections import Counter
from pathlib import Path

from cuda_emulator import ptx


def main() -> None:
    if not sys.argv[1:]:
        print("\n".join(ptx.known_kinds()))
        return
    try:
        found = Counter(kind for file in sys.argv[1:] for _, _, kind in ptx.listed(Path(file)))
    except ptx.Failed as error:
        raise SystemExit(str(error)) from None
    for kind, count in sorted(found.items()):
        print(f"{kind:32} {count:8}")


if __name__ == "__main__":
    main()
