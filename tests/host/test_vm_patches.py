"""The ports apply without fuzz, to the right sources, and leave nothing half-applied."""

from __future__ import annotations

import hashlib
from pathlib import Path

import pytest

from vm import patches, source
from vm.log import Failure


def contents(top: Path) -> dict[str, bytes]:
    return {str(path.relative_to(top)): path.read_bytes() for path in top.rglob("*") if path.is_file()}


def test_port_fits_its_own_context(port: patches.Port, old_texts: dict[str, str], tree: Path) -> None:
    for name, text in old_texts.items():
        (tree / name).write_text(text)
    fit = patches.fit(source.identify(tree))
    assert fit.port == port
    assert not fit.already
    for name in port.files:
        assert fit.stock[name] == (tree / name).read_bytes()
    assert b"case" not in fit.patched["sys/sys/eventvar.h"]
    assert b"#define KQUEUE_TICKLE\t\t_IO('k', 2)" in fit.patched["sys/sys/event.h"]
    assert b"volatile u_int\tkq_wait;" in fit.patched["sys/sys/eventvar.h"]


def test_port_is_small_and_tidy(port: patches.Port) -> None:
    """Some fifty lines, without trailing space, none over 80 columns."""
    lines = [line for line in port.path.read_text().splitlines() if line[:4] not in ("--- ", "+++ ")]
    added = [line[1:] for line in lines if line.startswith("+")]
    assert 0 < len(added) < 60
    for line in added:
        assert line == line.rstrip()
        assert len(line.expandtabs(8)) <= 80


def test_fit_only_reads_the_source(tree: Path) -> None:
    before_fit = contents(tree)
    patches.fit(source.identify(tree))
    assert contents(tree) == before_fit


def test_patched_source_is_recognised_and_gives_both_variants(tree: Path) -> None:
    first = patches.fit(source.identify(tree))
    for name, content in first.patched.items():
        (tree / name).write_bytes(content)
    second = patches.fit(source.identify(tree))
    assert second.already
    assert second.patched == first.patched
    assert second.stock == first.stock


def test_source_that_no_port_fits_is_refused_with_its_revision(tree: Path) -> None:
    path = tree / "sys/kern/kern_event.c"
    path.write_text(path.read_text().replace("cv_timedwait_sig", "cv_timedwait_other"))
    with pytest.raises(Failure, match=r"no port fits NetBSD 10\.99\.12 \(kern_event\.c 1\.150\)") as caught:
        patches.fit(source.identify(tree))
    assert "cv_timedwait_sig" in caught.value.tail


def test_half_patched_source_is_refused(tree: Path) -> None:
    fit = patches.fit(source.identify(tree))
    (tree / "sys/sys/event.h").write_bytes(fit.patched["sys/sys/event.h"])
    with pytest.raises(Failure, match="no port fits"):
        patches.fit(source.identify(tree))


def test_original_patch_is_as_posted() -> None:
    """The checksum of the attachment in the archive's mail."""
    posted = patches.PATCHES / "original/kticklev2.patch"
    assert hashlib.sha256(posted.read_bytes()).hexdigest() == (
        "01da6c5f360af3ef2b227efa82cde71620755dfb5d80a4b9081e7f00d0d1ad8e"
    )
