"""Runs the tests of OpenAI's Node library (node/client.test.mjs) and shows each of them as one of ours."""

import os
import re
import shutil
import subprocess
import xml.etree.ElementTree as xml
from pathlib import Path

import pytest

FILE = Path(__file__).parent / "node/client.test.mjs"
NAMES = re.findall(r'^test\("([^"]+)"', FILE.read_text(), re.M)


@pytest.fixture(scope="module")
def results(server, tmp_path_factory):
    """Name of each test to its failure, which is empty for a success."""
    place = Path(os.environ["CLIENTS_NODE_DIR"])
    # Beside node_modules, where Node looks for them.
    here = shutil.copyfile(FILE, place / FILE.name)
    report = tmp_path_factory.mktemp("node") / "report.xml"
    command = [os.environ["CLIENTS_NODE"], "--test", "--test-timeout=60000", "--test-reporter=junit",
               f"--test-reporter-destination={report}", here.name]
    done = subprocess.run(command, cwd=place, env=os.environ | {"SWAPD_URL": server.url}, capture_output=True,
                          text=True, timeout=85)
    assert report.is_file() and report.stat().st_size, done.stdout + done.stderr
    cases = xml.parse(report).getroot().iter("testcase")
    found = {case.get("name"): "\n".join(f.text or f.get("message", "") for f in case.iter("failure")) for case in cases}
    assert done.returncode == (1 if any(found.values()) else 0), done.stdout + done.stderr
    return found


def test_all_of_them_ran(results):
    assert NAMES and sorted(results) == sorted(NAMES)


@pytest.mark.parametrize("name", NAMES)
def test_node(results, name):
    if results[name]:
        pytest.fail(results[name], pytrace=False)
