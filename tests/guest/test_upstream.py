"""What NetBSD would get besides the kernel's code: the ATF test, and the manual page of pykq's own guest."""

import os
import re
import subprocess
from pathlib import Path

import pytest

T_TICKLE = Path(os.environ.get("PYKQ_PROGRAMS", "none"), "t_tickle")
PAGE = Path("/usr/share/man/man2/kqueue.2")


@pytest.mark.skipif(not T_TICKLE.exists(), reason="PYKQ_PROGRAMS has no t_tickle: the sets have no ATF")
def test_t_tickle_passes_and_fails_without_the_ioctl(tickling):
    listed = subprocess.run([T_TICKLE, "-l"], capture_output=True, text=True, check=True).stdout
    cases = re.findall(r"^ident: (\S+)$", listed, re.MULTILINE)
    results = {}
    for case in cases:
        done = subprocess.run([T_TICKLE, case], capture_output=True, text=True, timeout=120)
        results[case] = done.stdout.splitlines()[-1]
    print(results)
    assert len(cases) == 8
    expected = "passed" if tickling else "failed: .*KQUEUE_TICKLE: Inappropriate ioctl"
    assert all(re.match(expected, result) for result in results.values()), results


@pytest.mark.skipif("PYKQ_EXPECT" not in os.environ, reason="not pykq's own guest")
@pytest.mark.skipif(not PAGE.exists(), reason="the source that the image was made with has no kqueue.2")
def test_man_kqueue_shows_the_ioctl():
    page = subprocess.run(["man", "kqueue"], capture_output=True, text=True, check=True).stdout
    text = re.sub(".\b", "", page)
    assert "ioctl(kq, KQUEUE_TICKLE);" in text
    assert "first appeared in NetBSD 12.0" in text
