"""The guest's serial console on the user's terminal."""

from __future__ import annotations

import os
import selectors
import socket
import sys
import termios
import tty

from .log import Failure, say
from .qemu import Machine

_LEAVE = b"\x1d"  # Ctrl-]


def attach(machine: Machine) -> None:
    """Join the terminal and the console until Ctrl-] or the guest's end.

    What the guest sends reaches the terminal as it is, control sequences
    included: this is a terminal session with a machine of one's own.
    """
    if not sys.stdin.isatty():
        raise Failure("the console needs a terminal", hint=f"its text is in {machine.console_log}")
    say("console: Ctrl-] leaves, Return shows a prompt")
    with socket.socket(socket.AF_UNIX) as line:
        line.connect(str(machine.console))
        before = termios.tcgetattr(sys.stdin)
        try:
            tty.setraw(sys.stdin)
            _relay(line)
        finally:
            termios.tcsetattr(sys.stdin, termios.TCSADRAIN, before)
    print()


def _relay(line: socket.socket) -> None:
    """Copy bytes both ways."""
    with selectors.DefaultSelector() as selector:
        selector.register(sys.stdin.fileno(), selectors.EVENT_READ)
        selector.register(line, selectors.EVENT_READ)
        while True:
            for key, _ in selector.select():
                if key.fileobj is line:
                    data = line.recv(4096)
                    if not data:
                        return
                    os.write(sys.stdout.fileno(), data)
                else:
                    data = os.read(sys.stdin.fileno(), 1024)
                    if not data or _LEAVE in data:
                        return
                    line.sendall(data)
