"""The examples of the README's section "In a program" print what their comments say."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

README = Path(__file__).resolve().parents[2] / "README.md"
SECTION = re.search(r"^## In a program$(.*?)^## ", README.read_text(), re.MULTILINE | re.DOTALL)[1]
EXAMPLES = re.findall(r"^```python\n(.*?)^```$", SECTION, re.MULTILINE | re.DOTALL)


def test_there_are_four():
    assert len(EXAMPLES) == 4


@pytest.mark.parametrize("example", EXAMPLES, ids=range(len(EXAMPLES)))
def test_an_example_prints_what_it_says(kernel, example):
    if not kernel.shares_descriptors and re.search("socket|asyncio", example):
        pytest.skip(f"it watches descriptors of the running system, which this is not: {kernel.name}")
    done = subprocess.run([sys.executable, "-c", example], capture_output=True, text=True, timeout=60)
    assert done.stderr == ""
    printed = list(dict.fromkeys(done.stdout.splitlines()))  # a timer may fire once or twice
    assert printed == re.findall(r"# prints (.*)", example)
