"""A model of the tickle, small enough to look at every state it can reach.

``python patches/model.py`` checks that no order of steps loses a tickle, and that every mutant, a way to
get the patch wrong, is found out. The steps are those of kqueue_scan, kqueue_ioctl, knote_enqueue and
kqueue_restart in sys/kern/kern_event.c: what lies between two of them touches nothing that is shared.

Assumptions, which are what kern_condvar.c, kern_sleepq.c and kern_mutex.c promise:

* kq_lock is held by one thread at a time, and what one holder wrote the next one reads;
* atomic_or_uint_nv, atomic_inc_uint_nv and the like on kq_wait happen one after the other, in an order that
  all see; membar_release and membar_acquire then let whoever a tickle interrupts see what was before it;
* cv_timedwait_sig puts its caller on the sleep queue before it lets go of the lock, and has the lock again
  when it returns;
* cv_broadcast takes every thread off the queue that is on it, and whoever is off it runs some time;
* a timeout or a signal ends a sleep at any moment or never, and says so;
* close(2) sets KQ_RESTART once, broadcasts, and waits for all who are inside;
* in the ports to NetBSD 10 and later a change may sleep on kq_cv, too, while a knote is in flux
  (KQ_FLUX_WAIT), without timeout or signal; how long a flux lasts is for others to say, and no tickle may
  wait for its end.

What is left out:

* which events there are (a count will do) and how they are copied out;
* before NetBSD 10 a wait whose time is up when its only event has gone again returns 0, and has consumed a
  tickle (README.md);
* a kevent without room for events, or whose changes fail: it never scans (T6), and touches no flag;
* scans that sleep because of another scan's marker: like a change, they sleep until a broadcast that the
  other is bound to send, and holding nothing;
* fd_lock: whoever waits for it holds nothing that is modelled;
* threads that come by fork, which inherit no kqueue.

The model finds a race of NetBSD's own, with and without the patch: kqueue_scan looks for KQ_RESTART after
it has slept and not before. A thread that has its reference and does not sleep yet when close(2) comes
sleeps on, and close waits for it; fd_close in kern_descrip.c has an XXX about it. A tickle cannot help, as
the descriptor is gone.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from typing import NamedTuple

# Ways to get the patch wrong.
MUTANTS = (
    "the ioctl wakes, but sets no flag",
    "the ioctl sets the flag, but does not wake",
    "the ioctl looks for sleepers before it sets the flag",
    "the ioctl wakes without the lock",
    "a wait looks for a tickle, then counts itself",
    "a wait does not look for a tickle when it counts itself",
    "the flag is not tested after the sleep",
    "the flag is cleared on the way in",
    "the flag is not cleared",
    "the flag is not cleared with events",
    "the flag is not cleared by a poll",  # T5
    "the flag is cleared at every end of a scan",
    "the flag is cleared before the events are looked at",
    "a tickle wins over events",  # T2, the bug of the patch's first version
    "a timeout wins over a tickle",
    "the branch for a tickle keeps the lock",  # as the archived patch reads
    "the ioctl wakes one of the sleepers",  # cv_signal: it may be one that waits for the end of a flux
)

# What a thread does: waits in kevent for ever, or with a timeout, or polls; sends; queues an event; closes;
# changes a knote, which waits while one is in flux; ends the flux.
WAITS = ("wait", "timed wait", "poll")


class Thread(NamedTuple):
    at: str  # the next step, "" between two calls
    calls: tuple[str, ...]  # the call it is in, and those to come
    error: str = ""  # what its kevent is going to return


class State(NamedTuple):
    threads: tuple[Thread, ...]
    signals: int = 0  # how many may still arrive
    owner: int = -1  # who holds kq_lock
    asleep: frozenset[int] = frozenset()  # who is on kq_cv's sleep queue
    queued: int = 0  # kq_count
    restart: bool = False  # KQ_RESTART
    influx: bool = False  # a knote is in flux
    tickled: bool = False  # KQ_TICKLED in kq_wait
    sleepers: int = 0  # the rest of kq_wait
    due: bool = False  # no field of the kernel's: a tickle was sent, and no scan has ended since


class Wrong(Exception):
    """A rule is broken; the arguments are what happened and how."""


def steps(state: State, me: int, mutant: str) -> Iterator[tuple[State, bool]]:
    """What a thread can do next, and whether that is left to chance: a timeout, a signal, a flux's end."""
    threads, thread = state.threads, state.threads[me]
    at, call = thread.at, thread.calls[0] if thread.calls else ""

    def go(to: str, error: str = thread.error, **changes: object) -> tuple[State, bool]:
        moved = (*threads[:me], Thread(to, thread.calls, error), *threads[me + 1 :])
        return state._replace(threads=moved, **changes), False  # type: ignore[arg-type]

    def leave() -> tuple[State, bool]:
        moved = (*threads[:me], Thread("", thread.calls[1:]), *threads[me + 1 :])
        return state._replace(threads=moved, owner=-1), False

    if not call:
        return
    elif at == "" and call == "settle":
        if state.owner == -1:
            yield go("settle", owner=me)[0], True
    elif at == "" and call == "tickle" and mutant == "the ioctl looks for sleepers before it sets the flag":
        yield go("tickle", "slept" if state.sleepers else "awake")
    elif at == "" and call == "tickle":
        yield go("tickle")
    elif at == "":  # mutex_spin_enter(&kq->kq_lock)
        if state.owner == -1:
            early = mutant == "the flag is cleared on the way in" and call in WAITS
            yield go("retry" if call in WAITS else call, owner=me, tickled=state.tickled and not early)

    # kqueue_ioctl
    elif at == "tickle":  # if (atomic_or_uint_nv(&kq->kq_wait, KQ_TICKLED) != KQ_TICKLED)
        asleep = state.sleepers > 0
        if thread.error:
            asleep = thread.error == "slept"
        flag = mutant != "the ioctl wakes, but sets no flag"
        if asleep:
            yield go("wake", "", tickled=flag, due=True)
        else:
            moved, _ = leave()
            yield moved._replace(tickled=flag, due=True, owner=state.owner), False
    elif at == "wake":  # mutex_spin_enter(&kq->kq_lock)
        if mutant == "the ioctl wakes without the lock":
            yield go("broadcast")
        elif state.owner == -1:
            yield go("broadcast", owner=me)
    elif at == "broadcast":  # cv_broadcast(&kq->kq_cv)
        stay: frozenset[int] = frozenset()
        if call == "tickle" and mutant == "the ioctl sets the flag, but does not wake":
            stay = state.asleep
        if call == "tickle" and mutant == "the ioctl wakes one of the sleepers":
            for one in state.asleep:
                yield go("exit", asleep=state.asleep - {one})
            if state.asleep:
                return
        yield go("exit", asleep=stay)
    elif at == "exit":  # mutex_spin_exit(&kq->kq_lock)
        moved, _ = leave()
        yield moved if state.owner == me else moved._replace(owner=state.owner), False

    # kqueue_register, knote_detach: while (kn_in_flux(kn)) KQ_FLUX_WAIT(kq); and the end of a flux
    elif at == "change":
        yield go("cv_enter") if state.influx else go("exit")
    elif at == "settle":
        yield go("broadcast", influx=False)

    # knote_enqueue, kqueue_restart
    elif at == "event":
        yield go("broadcast", queued=state.queued + 1)
    elif at == "close":
        yield go("broadcast", restart=True)

    # kqueue_scan
    elif at == "retry":  # if (KQ_COUNT(kq) == 0) { if (timeout >= 0) {
        if state.queued:
            early = mutant == "the flag is cleared before the events are looked at"
            yield go("marked", owner=-1, tickled=state.tickled and not early)
        elif call == "poll":
            yield go("untickle")
        elif mutant == "a wait looks for a tickle, then counts itself":
            yield go("count", "tickle seen" if state.tickled else "")
        else:
            yield go("count")
    elif at == "count":  # if (atomic_inc_uint_nv(&kq->kq_wait) < KQ_TICKLED)
        seen = state.tickled
        if mutant == "a wait looks for a tickle, then counts itself":
            seen = thread.error == "tickle seen"
        if mutant == "a wait does not look for a tickle when it counts itself":
            seen = False
        yield go("woken" if seen else "cv_enter", "", sleepers=state.sleepers + 1)
    elif at == "cv_enter":
        yield go("mutex_exit", asleep=state.asleep | {me})
    elif at == "mutex_exit":
        yield go("sleep", owner=-1)
    elif at == "sleep":
        if me not in state.asleep:
            if state.owner == -1:
                yield go("change" if call == "change" else "woken", owner=me)
            return
        if call == "change":
            return
        rest = state.asleep - {me}
        if call == "timed wait":
            yield go("sleep", "EWOULDBLOCK", asleep=rest)[0], True
        if state.signals:
            yield go("sleep", "signal", asleep=rest, signals=state.signals - 1)[0], True
    elif at == "woken":  # if (KQ_COUNT(kq) == 0 && kqueue_untickle(kq, 1))
        error, tested = thread.error, mutant != "the flag is not tested after the sleep"
        if mutant == "a timeout wins over a tickle" and error == "EWOULDBLOCK":
            tested = False
        if state.tickled and tested and (state.queued == 0 or mutant == "a tickle wins over events"):
            yield go("clear", "tickled")
        else:
            over = " over a tickle" if error and state.tickled and state.queued == 0 else ""
            yield go("count out", error + over)
    elif at == "count out":  # atomic_dec_uint(&kq->kq_wait)
        yield go("slept", sleepers=state.sleepers - 1)
    elif at == "clear":  # atomic_add_int(&kq->kq_wait, (int)-(KQ_TICKLED + 1))
        if not state.due:
            raise Wrong("a wait was interrupted, and no tickle had been sent since the last return")
        if state.queued:
            raise Wrong("a tickle won over an event")
        if mutant == "the branch for a tickle keeps the lock":
            moved, _ = leave()
            yield moved._replace(owner=me, tickled=False, sleepers=state.sleepers - 1, due=False), False
        else:
            kept = mutant == "the flag is not cleared"
            yield go("slept", tickled=kept, sleepers=state.sleepers - 1, due=False)
    elif at == "slept":
        if thread.error:
            yield go("end")
        elif state.queued == 0 and state.restart:
            yield go("end", "ERESTART")
        else:
            yield go("retry")
            if call == "timed wait":  # gettimeleft() says that nothing is left
                yield go("end", "EWOULDBLOCK")
    elif at == "marked":  # the scan takes fd_lock, and then kq_lock again
        if state.owner == -1:
            yield go("take", owner=me)
    elif at == "take":
        if state.queued == 0:  # another thread was faster
            yield go("retry")
        else:
            yield go("untickle", "events", queued=state.queued - 1)
            yield go("retry", queued=state.queued - 1)[0], True  # it has gone since it was queued
    elif at == "untickle":  # (void)kqueue_untickle(kq, 0), in a poll and with events
        kept = (
            mutant == "the flag is not cleared"
            or (mutant == "the flag is not cleared with events" and thread.error == "events")
            or (mutant == "the flag is not cleared by a poll" and call == "poll")
        )
        yield go("end", tickled=state.tickled and kept, due=False)
    elif at == "end":  # mutex_spin_exit(&kq->kq_lock); return
        moved, _ = leave()
        if thread.error.endswith("over a tickle"):
            raise Wrong("a wait timed out, and did not tell of the tickle")
        if mutant == "the flag is cleared at every end of a scan":
            if thread.error == "EWOULDBLOCK" and state.due and not state.queued:
                raise Wrong("a wait timed out, took a tickle, and did not tell of it")
            moved = moved._replace(tickled=False, due=False)
        yield moved, False


def check(first: State, mutant: str = "", *, closes: bool = False) -> int:
    """Visit every state that can be reached from the first; return how many there are.

    With closes, close(2) has to come to its end, too: which stock NetBSD does not keep.
    Raises Wrong, with the steps that lead to where a rule is broken.
    """
    before: dict[State, State | None] = {first: None}
    pending = [first]
    for state in pending:
        running = False
        try:
            for me in range(len(state.threads)):
                for after, by_chance in steps(state, me, mutant):
                    running |= not by_chance
                    if after not in before:
                        before[after] = state
                        pending.append(after)
            waiters = {one for one in state.asleep if state.threads[one].calls[0] in WAITS}
            if not running and state.due and waiters:
                raise Wrong("a tickle is lost, a thread sleeps on")
            if closes and not running and state.restart and waiters:
                raise Wrong("a thread sleeps on a kqueue that is being closed")
            if not running and state.owner != -1:
                raise Wrong("the lock is held for ever")
        except Wrong as wrong:
            raise Wrong(f"{wrong}:\n{_trace(before, state)}") from None
    return len(before)


def _trace(before: dict[State, State | None], last: State | None) -> str:
    """The way to a state, one line for each step that somebody made."""
    path = []
    while last is not None:
        path.append(last)
        last = before[last]
    lines = []
    for old, new in zip(path[::-1], path[-2::-1], strict=False):
        for number, (was, now) in enumerate(zip(old.threads, new.threads, strict=True)):
            if was != now:
                lines.append(f"  thread {number}, {was.calls[0]}: {was.at or 'enter'} -> {now.at or 'done'}"
                             f" {now.error}".rstrip())
    return "\n".join(lines)


def scenario(*threads: str, signals: int = 0, influx: bool = False) -> State:
    """Threads by what they do, one call after the other: "wait, poll"."""
    return State(tuple(Thread("", tuple(one.split(", "))) for one in threads), signals, influx=influx)


SCENARIOS = {
    "two waits, three tickles": scenario("wait, wait", "tickle, tickle, tickle"),
    "a wait after a poll": scenario("poll, wait", "tickle", "tickle"),
    "three waiters, three tickles": scenario("wait, wait", "wait", "wait", "tickle, tickle", "tickle"),
    "waiters and a poller": scenario("wait, wait", "wait", "poll, poll", "tickle, tickle"),
    "timeouts and signals": scenario("timed wait, wait", "timed wait", "wait", "tickle, tickle", signals=2),
    "events": scenario("wait, timed wait", "wait", "poll", "tickle, tickle", "event, event"),
    "events and signals": scenario("timed wait, wait", "wait, wait", "tickle, tickle", "event", signals=1),
    "a change waits for a flux": scenario(
        "wait", "timed wait", "change", "settle", "tickle, tickle", influx=True
    ),
    "close": scenario("wait", "timed wait", "wait", "tickle, tickle", "event", "close", signals=1),
}
CLOSE = scenario("wait", "close")


def found_out(mutant: str) -> str:
    """What is wrong with a mutant, and in which scenario it shows first; "" when it shows in none."""
    for name, first in SCENARIOS.items():
        try:
            check(first, mutant)
        except Wrong as wrong:
            return f"{wrong.args[0].partition(':')[0]} ({name})"
    return ""


def main() -> int:
    for name, first in SCENARIOS.items():
        print(f"{name}: nothing lost in {check(first)} states")
    for mutant in MUTANTS:
        print(f"{mutant}: {found_out(mutant) or 'not found out'}")
    try:
        check(CLOSE, closes=True)
    except Wrong as wrong:
        print(f"NetBSD's own code: {wrong}")
    return 0 if all(map(found_out, MUTANTS)) else 1


if __name__ == "__main__":
    sys.exit(main())
