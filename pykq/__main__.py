"""``python -m pykq``: what the kernel offers to pykq, as text or JSON. Exit status 1: there is no kqueue."""

import argparse
import ctypes
import itertools
import json
import sys
from typing import Any

from pykq import EVFILT, KQUEUE_TICKLE, Kernel, KernelUnavailable, load_kernel


def describe(kernel: Kernel) -> dict[str, Any]:
    """What the kernel says of itself; asks it on a kqueue of its own."""
    abi = kernel.abi
    return {
        "kernel": kernel.name,
        "kevent": {
            "system": abi.system,
            "since": abi.since,
            "entry": abi.entry,
            "bytes": ctypes.sizeof(abi.kevent),
        },
        "tickle": kernel.has_tickle,
        "mechanism": kernel.mechanism,
        "filters": filters(kernel),
    }


def filters(kernel: Kernel) -> dict[str, int]:
    """The kernel's filters, name to the kernel's number."""
    if kernel.abi.filters:
        return {f"EVFILT_{EVFILT(number).name}": systems for number, systems in kernel.abi.filters.items()}
    found = {}
    for number in itertools.count():
        try:
            found[kernel.kfilter_byfilter(number)] = number
        except FileNotFoundError:
            break
    return found


def main(args: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m pykq", description="Say what the kernel offers to pykq.")
    parser.add_argument("--kernel", help="system, rump, rump:stock or a directory (default: $PYKQ_KERNEL)")
    parser.add_argument("--json", action="store_true", help="for programs")
    options = parser.parse_args(args)
    try:
        facts = describe(load_kernel(options.kernel))
    except KernelUnavailable as error:
        if options.json:
            print(json.dumps({"kernel": None, "error": str(error)}))
        else:
            print(f"pykq: {error}", file=sys.stderr)
        return 1
    if options.json:
        print(json.dumps(facts))
        return 0
    abi = facts["kevent"]
    has_tickle = "yes" if facts["tickle"] else "no"
    print(f"kernel         {facts['kernel']}")
    since = f"{abi['system']} {abi['since']}"
    print(f"kevent         {abi['entry']} of {since} and later, struct kevent of {abi['bytes']} bytes")
    print(f"KQUEUE_TICKLE  {has_tickle} ({KQUEUE_TICKLE:#x})")
    print(f"mechanism      {facts['mechanism']}")
    print(f"filters        {' '.join(facts['filters'])}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
