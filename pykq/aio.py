"""An asyncio event loop that is woken up by a tickle, and not through a pair of sockets.

    with asyncio.Runner(loop_factory=pykq.aio.TickleEventLoop) as runner:
        runner.run(main())

What changes for a program: ``call_soon_threadsafe`` is cheaper, and the loop holds no socket pair. For the
rest it is asyncio's own ``SelectorEventLoop``.

trio cannot be switched so: what wakes its loop is the socket pair of ``trio._core._wakeup_socketpair``, which
its run loop makes for itself. Its public API lends out the kqueue (``trio.lowlevel.current_kqueue``), but not
the wait on it, and has no place for another waker; in guest mode trio waits in a thread of its own, too.
"""

import asyncio
import inspect
import os
import signal
from collections.abc import Callable
from typing import Any

from pykq._callable import callable
from pykq._kernel import Kernel
from pykq._mechanism import Mechanism
from pykq._selector import TickleSelector


class TickleEventLoop(asyncio.SelectorEventLoop):
    """``asyncio.SelectorEventLoop`` with a ``TickleSelector``; takes the arguments of that.

    It replaces these methods of asyncio's loop, CPython 3.11 to 3.14: ``_make_self_pipe``,
    ``_close_self_pipe``, ``_write_to_self``, ``add_signal_handler`` and ``remove_signal_handler``.
    """

    _closed = True  # asyncio's __del__ asks, also when there was no kernel to make a selector of

    def __init__(
        self,
        kernel: Kernel | str | os.PathLike[str] | None = None,
        *,
        mechanism: Mechanism | str | None = None,
    ) -> None:
        selector = TickleSelector(kernel, mechanism=mechanism)
        self._wakeup = selector.wakeup
        super().__init__(selector)

    def _make_self_pipe(self) -> None:
        """There is none."""

    def _close_self_pipe(self) -> None:
        """There is none."""

    def _write_to_self(self) -> None:
        try:  # noqa: SIM105  # contextlib.suppress takes longer than all the rest
            self._wakeup()
        except (OSError, ValueError):  # the loop was closed meanwhile
            pass

    def add_signal_handler(  # type: ignore[override]
        self, sig: int, callback: Callable[..., object], *args: Any
    ) -> None:
        """Call ``callback(*args)`` from the loop when the process gets a signal. Main thread only.

        asyncio has the interpreter's C handler write to the socket pair. Here the kqueue itself watches for
        the signal: an ioctl could not be made from a C handler without C code, and a Python handler would not
        run while the main thread sleeps and another thread has been given the signal.

        Raises:
            ValueError: there is no such signal.
            RuntimeError: it cannot be caught, or this is not the main thread.
            TypeError: the callback cannot be called, or is a coroutine function.
        """
        if inspect.iscoroutine(callback) or inspect.iscoroutinefunction(callback):
            raise TypeError("coroutines cannot be used with add_signal_handler()")
        if not callable(callback):
            raise TypeError(f"callback must be callable, not {callback!r}")
        self._check_signal(sig)  # type: ignore[attr-defined]
        self._check_closed()  # type: ignore[attr-defined]
        watch = self._selector.on_signal  # type: ignore[attr-defined]
        try:
            watch(sig, self._handle_signal)  # type: ignore[attr-defined]  # first, so that none is lost
            try:
                signal.signal(sig, _ignore)  # so that the signal does not do what it does by default
                signal.siginterrupt(sig, False)
            except BaseException:
                watch(sig, None)
                raise
        except (ValueError, OSError) as error:
            raise RuntimeError(f"sig {sig} cannot be caught: {error}") from None
        handle = asyncio.Handle(callback, args, self)
        self._signal_handlers[sig] = handle  # type: ignore[attr-defined]

    def remove_signal_handler(self, sig: int) -> bool:
        """Undo ``add_signal_handler``; False when there is nothing to be undone. Main thread only."""
        self._check_signal(sig)  # type: ignore[attr-defined]
        if self._signal_handlers.pop(sig, None) is None:  # type: ignore[attr-defined]
            return False
        if not self.is_closed():
            self._selector.on_signal(sig, None)  # type: ignore[attr-defined]
        signal.signal(sig, signal.default_int_handler if sig == signal.SIGINT else signal.SIG_DFL)
        return True


def _ignore(number: int, frame: object) -> None:
    """A handler, because SIG_IGN would be handed down to child processes."""
