"""A source tree is recognised, and an overlay never reaches it."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from vm import source
from vm.log import Failure


def test_tree_is_identified_by_what_it_holds(tree: Path) -> None:
    found = source.identify(tree)
    assert (found.version, found.number, found.revision) == ("10.99.12", 1099001200, "1.150")


@pytest.mark.parametrize("missing", ["build.sh", "sys/sys/param.h", "sys/kern/kern_event.c", "tools"])
def test_folder_that_is_no_source_is_refused_by_what_it_lacks(tree: Path, missing: str) -> None:
    path = tree / missing
    path.rename(tree.parent / "elsewhere")
    with pytest.raises(Failure, match=f"not a NetBSD source tree: it has no {missing}"):
        source.identify(tree)


def test_missing_folder_is_refused(tmp_path: Path) -> None:
    with pytest.raises(Failure, match="no such folder"):
        source.identify(tmp_path / "none")


def test_overlay_has_the_changes_and_the_source_has_not(tree: Path, tmp_path: Path) -> None:
    original = (tree / "sys/sys/event.h").read_bytes()
    found = source.identify(tree)
    copy = tmp_path / "copy"
    source.overlay(found, copy, {"sys/sys/event.h": b"changed\n"})
    assert (copy / "sys/sys/event.h").read_bytes() == b"changed\n"
    assert (tree / "sys/sys/event.h").read_bytes() == original
    assert (copy / "sys/sys/param.h").read_bytes() == (tree / "sys/sys/param.h").read_bytes()
    assert (copy / "share").is_symlink()


def test_unchanged_overlay_is_not_written_again(tree: Path, tmp_path: Path) -> None:
    found, copy = source.identify(tree), tmp_path / "copy"
    changed = {"sys/sys/event.h": b"changed\n"}
    source.overlay(found, copy, changed)
    times = {path: path.lstat().st_mtime_ns for path in copy.rglob("*") if path.is_file()}
    source.overlay(found, copy, changed)
    assert times == {path: path.lstat().st_mtime_ns for path in copy.rglob("*") if path.is_file()}


def test_overlay_follows_edits_new_files_and_removals(tree: Path, tmp_path: Path) -> None:
    found, copy = source.identify(tree), tmp_path / "copy"
    source.overlay(found, copy, {"sys/sys/event.h": b"changed\n"})
    (tree / "sys/sys/new.h").write_text("new\n")
    (tree / "sys/sys/eventvar.h").unlink()
    replacement = tree / "sys/sys/param.new"
    replacement.write_text("edited\n")
    replacement.rename(tree / "sys/sys/param.h")
    source.overlay(found, copy, {})
    assert (copy / "sys/sys/new.h").read_text() == "new\n"
    assert not (copy / "sys/sys/eventvar.h").exists()
    assert (copy / "sys/sys/param.h").read_text() == "edited\n"
    assert (copy / "sys/sys/event.h").read_bytes() == (tree / "sys/sys/event.h").read_bytes()


def test_overlay_copies_where_links_do_not_reach(
    tree: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*arguments: object, **options: object) -> None:
        raise OSError(18, "Invalid cross-device link")

    monkeypatch.setattr(os, "link", refuse)
    found, copy = source.identify(tree), tmp_path / "copy"
    source.overlay(found, copy, {"sys/sys/event.h": b"changed\n"})
    there = (copy / "sys/sys/param.h").stat()
    assert there.st_nlink == 1
    assert there.st_mtime_ns == (tree / "sys/sys/param.h").stat().st_mtime_ns
    source.overlay(found, copy, {"sys/sys/event.h": b"changed\n"})
    assert (copy / "sys/sys/param.h").stat().st_ino == there.st_ino


def test_fingerprint_changes_with_a_file_that_kernels_are_built_from(tree: Path) -> None:
    found = source.identify(tree)
    first = found.fingerprint()
    assert found.fingerprint() == first
    (tree / "common/new.c").write_text("x")
    assert found.fingerprint() != first
