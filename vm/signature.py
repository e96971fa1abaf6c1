"""Lists of hashes that NetBSD signs, checked by gpg where it is installed and has the key."""

from __future__ import annotations

import re
import shutil
import subprocess

from .log import Failure

SIGNER = "security-officer@NetBSD.org"


def is_known() -> bool:
    """Tell whether gpg is here and has a key of the signer."""
    return shutil.which("gpg") is not None and bool(_keys())


def verified(message: bytes, url: str) -> bytes:
    """Return the text that is signed in a clear-signed message; raise Failure without a good signature.

    A key that has expired since is good enough: old releases are signed with it.
    """
    done = _gpg("--status-fd", "2", "--decrypt", content=message)
    status = done.stderr.decode("utf-8", "replace")
    good = re.search(r"^\[GNUPG:\] (GOODSIG|EXPKEYSIG) ", status, re.MULTILINE)
    valid = re.search(r"^\[GNUPG:\] VALIDSIG ([0-9A-F]+) ", status, re.MULTILINE)
    if done.returncode or good is None or valid is None or valid[1] not in _keys():
        raise Failure(f"{url} has no good signature of {SIGNER}", hint="do not use this mirror")
    return done.stdout


def _keys() -> set[str]:
    """Return the fingerprints of the signer's keys and subkeys in gpg's keyring."""
    listed = _gpg("--with-colons", "--list-keys", f"<{SIGNER}>").stdout.decode("utf-8", "replace")
    return set(re.findall(r"^fpr:+([0-9A-F]+):", listed, re.MULTILINE))


def _gpg(*words: str, content: bytes = b"") -> subprocess.CompletedProcess[bytes]:
    return subprocess.run(["gpg", "--batch", *words], input=content, capture_output=True, check=False)
