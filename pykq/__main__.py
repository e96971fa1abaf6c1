"""``python -m pykq``: what the kernel offers to pykq, as text or JSON.

Exit status 1: there is no kqueue, or it has not the mechanism that ``PYKQ_MECHANISM`` wants.
"""

import argparse
import ctypes
import itertools
import json
import sys
from typing import Any

from pykq import EVFILT, KQUEUE_TICKLE, KernelUnavailable, Kqueue


def describe(kq: Kqueue) -> dict[str, Any]:
    """What its kernel says of itself."""
    kernel, abi = kq.kernel, kq.kernel.abi
    return {
        "kernel": kernel.name,
        "kevent": {
            "system": abi.system,
            "since": abi.since,
            "entry": abi.entry,
            "bytes": ctypes.sizeof(abi.kevent),
            "source": abi.source,
        },
        "tickle": kernel.has_tickle,
        "mechanism": kq.mechanism,
        "filters": filters(kq),
    }


def filters(kq: Kqueue) -> dict[str, int]:
    """The kernel's filters, name to the kernel's number."""
    others = kq.kernel.abi.filters
    if others:
        return {f"EVFILT_{EVFILT(number).name}": systems for number, systems in others.items()}
    found = {}
    for number in itertools.count():
        try:
            found[kq.kfilter_byfilter(number)] = number
        except FileNotFoundError:
            break
    return found


def main(args: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m pykq", description="Say what the kernel offers to pykq.")
    parser.add_argument("--kernel", help="system, rump, rump:stock or a directory (default: $PYKQ_KERNEL)")
    parser.add_argument("--json", action="store_true", help="for programs")
    options = parser.parse_args(args)
    try:
        with Kqueue(options.kernel) as kq:
            facts = describe(kq)
    except (KernelUnavailable, OSError, ValueError) as error:
        why = getattr(error, "strerror", None) or str(error)
        if options.json:
            print(json.dumps({"kernel": None, "error": why}))
        else:
            print(f"pykq: {why}", file=sys.stderr)
        return 1
    if options.json:
        print(json.dumps(facts))
        return 0
    abi = facts["kevent"]
    has_tickle = "yes" if facts["tickle"] else "no"
    print(f"kernel         {facts['kernel']}")
    since = f"{abi['system']} {abi['since']}"
    print(f"kevent         {abi['entry']} of {since} and later, struct kevent of {abi['bytes']} bytes")
    print(f"source         {abi['source']}")
    print(f"KQUEUE_TICKLE  {has_tickle} ({KQUEUE_TICKLE:#x})")
    print(f"mechanism      {facts['mechanism']}")
    print(f"filters        {' '.join(facts['filters'])}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
