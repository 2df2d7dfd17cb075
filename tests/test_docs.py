"""Every command in the README and in docstrings parses by its script's own parse_args."""
import importlib
import re
import shlex
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
START = r"(?:[^\s`]*python3? (?:-m common\.\w+|\w+\.py)|torchrun |modal run |python3 -m venv )"
COMMAND = re.compile(rf"^\s*({START}.*)$|`({START}[^`]*)`", re.M)  # a line of its own, or inline code


def commands() -> list[tuple[str, str]]:
    files = [ROOT / "README.md", *ROOT.glob("*.py"), *(ROOT / "common").glob("*.py"), *(ROOT / "logs").glob("*.md")]
    return [(f.name, (line or inline).strip()) for f in files for line, inline in COMMAND.findall(f.read_text())]


def parse(words: list[str]) -> None:
    """Send the flags of one command, split into words, through the parser of what it starts."""
    if "pytest" in words:
        return
    at = next((i for i, w in enumerate(words) if w.endswith(".py") or w.startswith("common.")), None)
    assert at is not None, words
    module = importlib.import_module(words[at].removesuffix(".py"))
    flags = words[at + 1:]
    if words[:2] == ["modal", "run"]:
        options = module.options_of(flags)
        if "timeout_hours" in options:
            options["timeout_hours"] = float(options["timeout_hours"])
        if set(options) - {"script", "pull"}:  # raises TypeError for a flag that is not there
            module.make_job(**options)
        return
    if words[at] == "common.repeat":
        args, rest = module.parse_args(flags)
        parse([str(args.script), *rest])
    else:
        module.parse_args(flags)


@pytest.mark.parametrize("file, command", commands())
def test_documented_command_parses(file, command):
    for part in re.split(r"\s*(?:&&|\|)\s*", command):
        words = shlex.split(part, comments=True)
        if not words or words[1:3] == ["-m", "venv"] or "pip" in words[0]:
            continue
        parse(words)


def test_the_readme_has_its_two_commands():
    lines = (ROOT / "README.md").read_text().splitlines()
    assert sum(x.startswith("python3 -m venv") and x.endswith("collatz.py") for x in lines) == 1
    assert sum(x.startswith("python3 -m venv") and "pytest" in x for x in lines) == 1


def test_the_worked_diff_takes_away_lines_that_are_there():
    diff = re.search(r"```diff\n(.*?)```", (ROOT / "README.md").read_text(), re.S)[1].splitlines()
    gone = [line[1:] for line in diff if line.startswith("-")]
    lines = (ROOT / "addition_train.py").read_text().splitlines()
    assert len(gone) >= 3 and set(gone) <= set(lines)


def test_a_wrong_command_would_be_noticed():
    with pytest.raises(SystemExit):
        parse(shlex.split("python collatz.py --no-such-flag"))
    with pytest.raises(SystemExit):
        parse(shlex.split("modal run --detach train_modal.py --args '--no-such-flag'"))
    with pytest.raises(TypeError):
        parse(shlex.split("modal run train_modal.py --no-such-flag 3"))


def test_the_worked_kind_of_problems_trains(tmp_path, monkeypatch):
    import self_improve as S
    code = re.search(r"below `KINDS`:\n\n```python\n(.*?)```", (ROOT / "logs" / "self_improve.md").read_text(), re.S)[1]
    monkeypatch.setattr(S, "KINDS", dict(S.KINDS))
    exec(code, namespace := dict(vars(S)))
    assert namespace["maximum_value"](("3", "9", "7")) == "9"
    problem = S.as_problem("maximum", ("3", "9", "7"), 2)
    trace = S.teach(problem, marks=True)
    assert trace.verdict == "strict" and trace.lines == [("3", "9", "7"), ("9", "7"), ("9",)]
    assert {len(p.line) for p in S.cases_of(S.as_problem("maximum", ("300", "9"), 1))} == {2}
    out = S.main(["--kinds", "maximum", "--width", "32", "--layers", "2", "--bootstrap-steps", "60", "--lr", "4e-3", "--steps", "1", "--k", "2",
                  "--problems", "6", "--updates", "4", "--batch-size", "32", "--n-test", "4", "--device", "cpu", "--threads", "1",
                  "--cache-dir", str(tmp_path / "cache"), "--out-dir", str(tmp_path / "run")])
    assert {name.split()[0] for name in out["test_cells"]} == {"maximum"}
