"""The README and the pages in results/: links, pictures, flags, and the code that is printed there."""

import importlib
import random
import re
import shutil
import subprocess
import sys

import pytest
import torch
from conftest import ROOT, SCRIPTS, TINY

from common import draw_face

PAGES = [ROOT / "README.md", *(ROOT / "results" / f"{name}.md" for name in SCRIPTS)]
README = PAGES[0].read_text()


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_link_and_picture_exists_and_every_picture_is_shown(page):
    text = re.sub(r"```.*?```", "", page.read_text(), flags=re.DOTALL)
    links = re.findall(r"\]\((?!http)([^)#]+)\)", text)
    assert links and [link for link in links if not (page.parent / link).exists()] == []


def test_no_picture_is_left_over():
    text = "".join(page.read_text() for page in PAGES)
    pictures = [path.name for path in (ROOT / "results").iterdir() if path.suffix != ".md"]
    assert pictures and [name for name in pictures if name not in text] == []


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_flag_of_every_command_is_known(page, cli, monkeypatch):
    monkeypatch.setenv("COLUMNS", "1000")
    commands = re.findall(r"python (?!figure)((?:tests/)?\w+)\.py([^`\n]*)", page.read_text())
    assert commands
    for script, rest in commands:
        if script.startswith("tests/"):
            known = (ROOT / f"{script}.py").read_text()
        else:
            known = cli(importlib.import_module(script), "--help").out
        for flag in re.findall(r"--[a-z0-9][a-z0-9-]*", rest):
            assert re.search(rf"{flag}\b(?!-)", known), (page.name, script, flag)


def test_the_options_named_on_a_page_are_some_script_s(cli, monkeypatch):
    monkeypatch.setenv("COLUMNS", "1000")
    known = "".join(cli(importlib.import_module(name), "--help").out for name in SCRIPTS)
    known += "".join((ROOT / "tests" / f"{name}.py").read_text() for name in ("benchmark", "make_classifier"))
    for page in PAGES:
        for flag in re.findall(r"`(--[a-z0-9][a-z0-9-]*)", page.read_text()):
            assert re.search(rf"{flag}\b(?!-)", known), (page.name, flag)


def run_printed(code, folder, *arguments):
    """Run a Python program printed on a page in a folder, beside the scripts; what it printed."""
    (folder / "printed.py").write_text(code)
    environment = {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "PATH": "/usr/bin:/bin"}
    command = [sys.executable, "printed.py", *arguments]
    result = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=120)
    assert result.returncode == 0, result.stderr
    return result.stdout


def test_the_printed_programs_run(photos, tmp_path, cli):
    use, copy = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    draw_face(random.Random(5), 50)[0].save(tmp_path / "me.jpg")
    run = tmp_path / "runs" / "photos"
    assert cli(importlib.import_module("aegan"), "--data", photos, *TINY, "--steps", 2, "--out", run).status == 0
    run_printed(use, tmp_path)
    assert all((tmp_path / name).stat().st_size > 500 for name in ("me.png", "new.png"))
    shown = run_printed(copy, tmp_path)
    assert shown.count("L_G_E") == 4 and (tmp_path / "samples.png").stat().st_size > 10_000


@pytest.mark.parametrize("name, width", [("vae_began", "--filters"), ("inverse_gen", "--gan-steps")])
def test_the_programs_on_the_pages_run(name, width, photos, tmp_path, cli):
    shutil.copytree(photos, tmp_path / "photos")
    rows = [f"{i}.png,{i % 2},{int(i > 5)}" for i in range(30)]
    (tmp_path / "photos" / "attributes.csv").write_text("\n".join(["file,odd,late", *rows]))
    classifier = torch.jit.trace(lambda x: (x[:, :, 0, 0], x[:, 0, 0]), torch.zeros(2, 3, 16, 16))
    classifier.save(str(tmp_path / "classifier.pt"))
    run = ["--data", tmp_path / "photos", *TINY[:2], *TINY[4:], width, 2, "--steps", 3, "--out", tmp_path / "run"]
    assert cli(importlib.import_module(name), *run).status == 0
    (code,) = re.findall(r"```python\n(.*?)```", (ROOT / "results" / f"{name}.md").read_text(), re.DOTALL)
    lines = run_printed(code, tmp_path, "run").splitlines()
    assert len(lines) > 1 and all(line.startswith("run ") and re.search(r"[01]\.\d\d", line) for line in lines)


def test_the_readme_is_short():
    assert len(README.splitlines()) <= 220 and len(README.encode()) <= 24_000
