"""The command line: options, exit codes, and one clear line for bad input."""

from __future__ import annotations

import json
import re
import subprocess
import sys

import pytest

import abjure
from abjure import cli, demo
from abjure.errors import ArgumentError


def test_info_names_versions_threads_and_instruction_set(capsys):
    assert cli.main(["info"]) == 0
    printed = capsys.readouterr().out
    assert re.search(rf"^abjure +{re.escape(abjure.__version__)}$", printed, re.M)
    assert cli.main(["info", "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts["threads"] == abjure.get_num_threads()
    assert facts["numpy"]
    assert facts["instruction set"] in ("baseline", "avx2", "avx512")


def test_info_says_what_is_not_installed(capsys, monkeypatch):
    monkeypatch.setattr(cli, "COMPANIONS", ("no-such-package-at-all",))
    assert cli.main(["info"]) == 0
    assert "no-such-package-at-all  not installed" in capsys.readouterr().out


def test_runs_as_a_module():
    done = subprocess.run([sys.executable, "-m", "abjure.cli", "--version"], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == f"abjure {abjure.__version__}"


@pytest.mark.parametrize("argv", [[], ["no-such-command"], ["demo", "--seed", "x"]])
def test_usage_errors_exit_with_2(argv, capsys):
    with pytest.raises(SystemExit) as stop:
        cli.main(argv)
    assert stop.value.code == 2
    assert "usage: abjure" in capsys.readouterr().err


def one_line(capsys) -> str:
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.count("\n") == 1
    return captured.err


@pytest.fixture
def idle(monkeypatch):
    """Fails the test if any part of the demo starts."""
    monkeypatch.setattr(demo, "run_part", lambda *a: pytest.fail("work began before the arguments were checked"))


@pytest.mark.parametrize("place", ["file", "below a file", "/proc/self"])
def test_unwritable_output_stops_before_any_work(place, tmp_path, capsys, idle):
    taken = tmp_path / "taken"
    taken.write_text("something else")
    out = {"file": taken, "below a file": taken / "sub"}.get(place, place)
    assert cli.main(["demo", "--out", str(out)]) == 2
    message = one_line(capsys)
    assert message.startswith(f"abjure: out: expected a folder that can be written, got '{out}'")
    assert taken.read_text() == "something else"
    with pytest.raises(ArgumentError, match="out: expected a folder"):
        demo.run(out=out)


def test_output_file_that_is_a_folder_stops_before_any_work(tmp_path, capsys, idle):
    (tmp_path / "demo.json").mkdir()
    assert cli.main(["demo", "--out", str(tmp_path)]) == 2
    assert "out: expected a folder that can be written" in one_line(capsys)


def test_unknown_part(tmp_path, capsys, idle):
    assert cli.main(["demo", "--only", "everything", "--out", str(tmp_path / "new")]) == 2
    assert "only: expected one of forget, protect, refuse, speed, got 'everything'" in one_line(capsys)
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize("seed", ["-1", str(2**32)])
def test_seed_out_of_range(seed, tmp_path, capsys, idle):
    assert cli.main(["demo", "--seed", seed, "--out", str(tmp_path / "new")]) == 2
    assert f"seed: expected an integer from 0 to 4294967295, got {seed}" in one_line(capsys)
    assert not (tmp_path / "new").exists()


def test_missing_packages_are_named_together(tmp_path, capsys, monkeypatch, idle):
    monkeypatch.setattr(demo, "REQUIRED", {"no_such_module_a": "package-a", "no_such_module_b": "package-b"})
    assert cli.main(["demo", "--out", str(tmp_path)]) == 2
    assert "the demo needs package-a, package-b: pip install 'abjure[demo]'" in one_line(capsys)


def test_bench_keeps_its_own_options(capsys):
    with pytest.raises(SystemExit) as stop:
        cli.main(["bench", "--help"])
    assert stop.value.code == 0
    assert "--scale" in capsys.readouterr().out


def test_bench_refuses_a_report_in_no_folder_before_measuring(tmp_path, capsys):
    with pytest.raises(SystemExit) as stop:
        cli.main(["bench", "--json", str(tmp_path / "none" / "report.json")])
    assert stop.value.code == 2
    assert "--json" in capsys.readouterr().err
