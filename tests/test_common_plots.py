"""common/plots.py: curves of runs over each other."""
from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from common import plots
from common.metrics import Metrics
from common.run import UserError

ROOT = Path(__file__).parents[1]
PNG = b"\x89PNG\r\n\x1a\n"


@pytest.fixture
def runs(tmp_path) -> list[Path]:
    """Two runs, a and b, of three rows; loss is step / 10 + 1 and step / 10 + 2."""
    folders = [tmp_path / name for name in "ab"]
    for i, folder in enumerate(folders):
        folder.mkdir()
        log = Metrics(folder / "metrics.csv")
        for step in (0, 10, 20):
            log.write({"step": step, "loss": step / 10 + i + 1, "sec": 0.5 * step, ("only_a", "only_b")[i]: 1.0})
    return folders


@pytest.fixture
def drawn(monkeypatch):
    """The figures that are saved, still open to be looked at."""
    figures, save = [], plots.save_figure
    monkeypatch.setattr(plots, "save_figure", lambda fig, path: (figures.append(fig), save(fig, path))[1])
    return figures


def lines(figure) -> dict[str, list[list[float]]]:
    (axes,) = figure.axes
    assert [t.get_text() for t in axes.get_legend().get_texts()] == [line.get_label() for line in axes.lines]
    return {line.get_label(): line.get_xydata().tolist() for line in axes.lines}


def test_main_draws_two_runs_into_a_png_in_the_first_folder(runs, drawn, capsys):
    plots.main([*map(str, runs), "--y", "loss"])
    picture = runs[0] / "loss.png"
    assert capsys.readouterr().out == f"{picture}\n"
    assert picture.read_bytes().startswith(PNG) and not list(runs[1].glob("*.png"))
    assert lines(drawn[0]) == {"a": [[0, 1], [10, 2], [20, 3]], "b": [[0, 2], [10, 3], [20, 4]]}
    axes = drawn[0].axes[0]
    assert (axes.get_xlabel(), axes.get_ylabel(), axes.get_yscale()) == ("step", "loss", "linear")


def test_the_flags_choose_the_other_axis_the_scale_and_the_file(runs, drawn, tmp_path):
    plots.main([str(runs[0] / "metrics.csv"), "--y", "loss", "--x", "sec", "--log", "--out", str(tmp_path / "p.svg")])
    assert b"<svg" in (tmp_path / "p.svg").read_bytes()
    assert lines(drawn[0]) == {"a": [[0, 1], [5, 2], [10, 3]]}
    assert drawn[0].axes[0].get_xlabel() == "sec" and drawn[0].axes[0].get_yscale() == "log"


def test_a_run_named_by_a_dot_or_its_csv_keeps_its_name_in_the_legend(runs, drawn, monkeypatch):
    monkeypatch.chdir(runs[0])
    plots.main([".", "../b", "metrics.csv", "--y", "loss"])
    assert [line.get_label() for line in drawn[0].axes[0].lines] == ["a", "b", "a"]
    assert (runs[0] / "loss.png").read_bytes().startswith(PNG)


def test_rows_without_the_figure_are_left_out(runs, drawn):
    (runs[0] / "metrics.csv").write_text("step,val\n0,\n10,0.5\n20,\n30,0.75\n")
    plots.curves([runs[0]], "val", "step", runs[0] / "val.png")
    assert lines(drawn[0]) == {"a": [[10, 0.5], [30, 0.75]]}


@pytest.mark.parametrize("argv, message", [
    (["--y", "nope"], "a: no column 'nope' in its metrics (it has: step, loss, sec, only_a)"),
    (["--y", "loss", "--x", "epoch"], "a: no column 'epoch' in its metrics (it has: step, loss, sec, only_a)"),
    (["--y", "only_a"], "b: no column 'only_a' in its metrics (it has: step, loss, sec, only_b)")])
def test_an_unknown_column_is_one_line_that_lists_the_known_ones_and_a_non_zero_exit(argv, message, runs):
    with pytest.raises(SystemExit) as e:
        plots.main([*map(str, runs), *argv])
    text = e.value.code
    assert text.startswith("common.plots: error: ") and text.endswith(message) and "\n" not in text
    assert not list(runs[0].glob("*.png"))


def test_a_run_without_rows_is_one_line_and_a_non_zero_exit(runs):
    (runs[0] / "metrics.csv").write_text("")
    with pytest.raises(SystemExit, match=r"^common.plots: error: [^\n]*no column 'loss' [^\n]*\(it has: no rows\)$"):
        plots.main([str(runs[0]), "--y", "loss"])


@pytest.mark.parametrize("missing", ["gone", "gone/metrics.csv"])
def test_a_missing_run_is_one_line_and_a_non_zero_exit(missing, runs, tmp_path):
    with pytest.raises(SystemExit, match=r"^common.plots: error: [^\n]*no such metrics file$"):
        plots.main([str(runs[0]), str(tmp_path / missing), "--y", "loss"])


def test_the_module_is_a_command(tmp_path):
    done = subprocess.run([sys.executable, "-m", "common.plots", str(tmp_path), "--y", "loss"], cwd=ROOT,
                          capture_output=True, text=True)
    text = f"common.plots: error: {tmp_path / 'metrics.csv'}: no such metrics file\n"
    assert (done.returncode, done.stdout, done.stderr) == (1, "", text)


@pytest.mark.parametrize("out", ["p.xyz", "p", "p."])
def test_a_picture_of_unknown_format_is_one_line_and_a_non_zero_exit(out, runs, tmp_path):
    with pytest.raises(SystemExit, match=rf"^common.plots: error: [^\n]*{out}: [^\n]*png[^\n]*$"):
        plots.main([str(runs[0]), "--y", "loss", "--out", str(tmp_path / out)])
    assert not list(tmp_path.glob("p*"))


def test_a_folder_that_is_not_there_is_one_line_and_a_non_zero_exit(runs, tmp_path):
    with pytest.raises(SystemExit, match=r"^common.plots: error: [^\n]*No such file[^\n]*$"):
        plots.main([str(runs[0]), "--y", "loss", "--out", str(tmp_path / "gone" / "p.png")])


def test_figures_are_closed_after_they_are_saved(runs, tmp_path):
    import matplotlib.pyplot as plt
    before = plt.get_fignums()
    fig, axes = plots.new_figure(2, 3)
    assert axes.shape == (2, 3) and list(fig.get_size_inches()) == [21.0, 8.4]
    assert plots.save_figure(fig, tmp_path / "p.png") == tmp_path / "p.png"
    with pytest.raises(UserError):
        plots.save_figure(plots.new_figure()[0], tmp_path / "p.xyz")
    assert plt.get_fignums() == before
