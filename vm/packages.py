"""Which package brings a program, by package manager, and the command that installs it."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterable

# Tried in this order; what each is told, and whether it wants root.
_MANAGERS = {
    "apt-get": (["install", "-y", "--no-install-recommends"], True),
    "dnf": (["install", "-y"], True),
    "pacman": (["-S", "--needed", "--noconfirm"], True),
    "brew": (["install"], False),
    "pkgin": (["-y", "install"], True),
}

# The packages of a program, in the order of _MANAGERS; '' comes with the system,
# on macOS with xcode-select --install, on NetBSD with the comp set.  Those of
# apt-get have been installed and used, the others are as their lists say.
_PACKAGES = {
    "ar": ("binutils", "binutils", "binutils", "binutils", ""),
    "c++": ("g++", "gcc-c++", "gcc", "", ""),
    "cc": ("gcc", "gcc", "gcc", "", ""),
    "clang": ("clang", "clang", "clang", "llvm", "clang"),
    "clang++": ("clang", "clang", "clang", "llvm", "clang"),
    "gcc": ("gcc", "gcc", "gcc", "gcc", ""),
    "gpg": ("gnupg", "gnupg2", "gnupg", "gnupg", "gnupg2"),
    "ld": ("binutils", "binutils", "binutils", "binutils", ""),
    "ld.lld": ("lld", "lld", "lld", "lld", "lld"),
    "make": ("make", "make", "make", "", ""),
    "objcopy": ("binutils", "binutils", "binutils", "binutils", ""),
    "patch": ("patch", "patch", "patch", "", ""),
    "qemu-system-x86_64": ("qemu-system-x86", "qemu-system-x86-core", "qemu-system-x86", "qemu", "qemu"),
    "ssh": ("openssh-client", "openssh-clients", "openssh", "", ""),
    "zlib.h": ("zlib1g-dev", "zlib-devel", "zlib", "", ""),
}


def install_command(missing: Iterable[str]) -> list[str]:
    """Return the command that installs what is missing, [] where no package manager does."""
    for column, (manager, (words, wants_root)) in enumerate(_MANAGERS.items()):
        if shutil.which(manager) is not None:
            packages = sorted({_PACKAGES[what][column] for what in missing if what in _PACKAGES} - {""})
            sudo = ["sudo"] if wants_root and os.geteuid() != 0 else []
            return [*sudo, manager, *words, *packages] if packages else []
    return []
