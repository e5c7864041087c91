"""`swapd check`: exit codes, and findings with file, line, column and key."""

import re
import subprocess

import pytest

from harness import DEMO, ROOT, SWAPD


def check(path, *more):
    done = subprocess.run([SWAPD, "check", "--config", path, *more], capture_output=True, text=True, timeout=20)
    return done.returncode, done.stdout + done.stderr


@pytest.fixture
def write(tmp_path):
    def write(text):
        path = tmp_path / "registry.yaml"
        path.write_text(text)
        return path
    return write


@pytest.mark.parametrize("path", sorted((ROOT / "configs").glob("*.yaml")), ids=lambda p: p.name)
def test_the_registries_of_this_repository_are_good(path):
    code, said = check(path)
    assert code == 0 and re.search(r"ok: \d+ model", said), said


def test_a_good_registry(write):
    path = write(f"models:\n  demo:\n    ttl: 60\n    worker: {{model: {DEMO}}}\n  other:\n    cmd: program --port ${{PORT}}\n")
    assert check(path) == (0, "ok: 2 models\n")


def test_all_mistakes_are_told_with_their_places(write):
    path = write("models:\n  demo:\n    ttl: soon\n    worker:\n      model: somewhere\n      maxTokens: -5\n")
    code, said = check(path)
    assert code == 1
    ttl, tokens = re.findall(rf"^{re.escape(str(path))}:(\d+):\d+: error: (.*)$", said, re.M)
    assert ttl[0] == "3" and "ttl" in ttl[1] and "soon" in ttl[1]
    assert tokens[0] == "6" and "maxTokens" in tokens[1] and "-5" in tokens[1]


def test_an_unknown_key_is_named_with_its_likeness(write):
    path = write(f"models:\n  demo:\n    tll: 60\n    worker: {{model: {DEMO}}}\n")
    code, said = check(path)
    assert code == 1 and f"{path}:3:5: " in said and "tll" in said and re.search(r"\bttl\b", said), said
    assert check(path, "--lenient")[0] == 0


@pytest.mark.parametrize("text", ["models: [", "models:\n\tdemo: {}\n", "- a\n- b\n", "models:\n  demo: {}\n",
                                  "models:\n  demo: {worker: {maxTokens: 5}}\n"])
def test_what_is_no_registry_is_refused(write, text):
    path = write(text)
    code, said = check(path)
    assert code == 1 and str(path) in said, said


def test_a_missing_file_is_named(tmp_path):
    code, said = check(tmp_path / "nothing.yaml")
    assert code == 1 and "nothing.yaml" in said


def test_serving_refuses_what_check_refuses(write):
    path = write("models:\n  demo:\n    ttl: soon\n    worker: {model: somewhere}\n")
    done = subprocess.run([SWAPD, "--config", path, "--listen", "127.0.0.1:0"], capture_output=True, text=True, timeout=20)
    assert done.returncode == 1 and f"{path}:3:" in done.stdout + done.stderr
    assert "listening" not in done.stdout + done.stderr


def test_a_bad_command_line_is_exit_code_2():
    done = subprocess.run([SWAPD, "--confg", "x"], capture_output=True, text=True, timeout=20)
    assert done.returncode == 2 and "--confg" in done.stderr
