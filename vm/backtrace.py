"""Names for the addresses in a guest's backtrace: by PVH a kernel starts without its symbol table."""

from __future__ import annotations

import bisect
import re
import subprocess
from pathlib import Path

_ADDRESS = re.compile(r"\?\(\) at (?:netbsd:\?\+?)?([0-9a-f]{16}|[0-9a-f]{8,})")


def with_names(text: str, kernel: Path) -> str:
    """Put the kernel's function names into a backtrace, as far as nm(1) knows them."""
    if not _ADDRESS.search(text):
        return text
    try:
        listing = subprocess.run(["nm", "-n", kernel], capture_output=True, text=True, check=True).stdout
    except (OSError, subprocess.CalledProcessError):
        return text
    lines = [line.split(maxsplit=2) for line in listing.splitlines() if not line.startswith(" ")]
    symbols = [(int(address, 16), name) for address, kind, name in lines if kind in "tT"]
    addresses = [address for address, _ in symbols]

    def name(match: re.Match[str]) -> str:
        address = int(match[1], 16)
        index = bisect.bisect_right(addresses, address) - 1
        if index < 0:
            return match[0]
        start, symbol = symbols[index]
        return f"{symbol}() at netbsd:{symbol}+{address - start:#x}"

    return _ADDRESS.sub(name, text)
