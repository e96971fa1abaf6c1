"""A machine that must not get the kernel does not get it."""

from __future__ import annotations

import pytest

from vm import install
from vm.log import Failure

KERNEL = {"netbsd": "10.1", "config": "GENERIC", "sha256": "00"}
MACHINE = {
    "system": "NetBSD",
    "machine": "amd64",
    "netbsd": "10.1",
    "version": "NetBSD 10.1 (GENERIC) #0: Mon Dec 16 13:08:11 UTC 2024",
    "booted": "netbsd",
    "user": "0",
    "sha256": "SHA256 (/netbsd) = 11",
    "free_kib": "100000",
}
SIZE_BYTES = 30 << 20


@pytest.mark.parametrize("ident", ["GENERIC", "GENERIC.pykq-stock"])
def test_a_machine_of_the_release_and_configuration_may_have_it(ident: str) -> None:
    install._check("box", MACHINE | {"version": f"NetBSD 10.1 ({ident}) #0: Mon"}, KERNEL, SIZE_BYTES)


@pytest.mark.parametrize(
    "fact, value, complaint, remedy",
    [
        ("system", "FreeBSD", "box is FreeBSD amd64", "NetBSD amd64"),
        ("machine", "i386", "box is NetBSD i386", "NetBSD amd64"),
        ("netbsd", "9.4", "runs NetBSD 9.4, the kernel is of 10.1", "--release"),
        ("version", "NetBSD 10.1 (XEN3_DOM0) #0", "has the configuration GENERIC", "--config"),
        ("version", "who knows", "has the configuration GENERIC", "--config"),
        ("booted", "/onetbsd", "has booted /onetbsd", "boot /netbsd"),
        ("user", "1000", "you are not root", "root@box"),
        ("free_kib", "50000", "50000 KiB free", "room"),
    ],
)
def test_any_other_is_refused_with_the_remedy(fact: str, value: str, complaint: str, remedy: str) -> None:
    with pytest.raises(Failure) as caught:
        install._check("box", MACHINE | {fact: value}, KERNEL, SIZE_BYTES)
    assert complaint in str(caught.value)
    assert remedy in caught.value.hint


def test_there_is_a_netbsd_at_every_moment() -> None:
    """It is replaced by a rename, after it got its second name."""
    assert install.SWAP.split(" && ")[:2] == ["ln -f /netbsd /onetbsd", f"mv {install.NEW} /netbsd"]
