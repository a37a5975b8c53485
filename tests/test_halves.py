"""Two processes tell what one would."""

import os
import re

import pytest
from conftest import program

WAITS = """
import os, time

def test_waits():
    copy = os.environ["FIRST"] != str(os.getpid())
    if copy:
        open({seen!r}, "w").close()
        {then}
    end = time.time() + 60
    while not os.path.exists({seen!r}) and time.time() < end:
        time.sleep(.01)
    assert not copy, "of the copy"
"""
START = """
import os, sys
import pytest
os.environ["FIRST"] = str(os.getpid())
sys.modules.pop("conftest"), sys.modules.pop("halves")  # this process is itself one of pytest
sys.exit(pytest.main(["-q", "-p", "no:cacheprovider", {folder!r}]))
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="there is no copy")
@pytest.mark.parametrize("then", ["pass", "os._exit(7)"])
def test_the_copy_is_heard(then, tmp_path, monkeypatch):
    """Each process waits until the copy has a test, which fails; a copy that dies is a failure."""
    monkeypatch.setattr(os, "cpu_count", lambda: 2)
    folder = tmp_path / "t"
    folder.mkdir()
    (folder / "conftest.py").write_text(
        f"import sys\nsys.path.insert(0, {os.path.dirname(__file__)!r})\n"
        "from halves import pytest_runtestloop\n")
    for name in "ab":
        (folder / f"test_{name}.py").write_text(
            WAITS.format(seen=str(tmp_path / "seen"), then=then)
            + "import pytest\n@pytest.mark.skip('why')\ndef test_left_out(): pass\n")
    (tmp_path / "start.py").write_text(START.format(folder=str(folder)))
    done = program(str(tmp_path / "start.py"))
    assert done.returncode == 1, done.stdout + done.stderr
    if then == "pass":
        assert "AssertionError: of the copy" in done.stdout
        assert re.search(r"1 failed, 1 passed, 2 skipped", done.stdout)
    else:
        assert "the copy ended with exit code 7" in done.stdout
