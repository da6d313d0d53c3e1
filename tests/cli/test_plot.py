"""What a run shows: plain lines, a bar on a terminal, a plot."""

import struct
import subprocess
import sys

import pytest
from helpers import Terminal

from minilora.cli.plot import check_plot, plot_losses, smoothed
from minilora.errors import MiniloraError
from minilora.training.checkpoint import History
from minilora.training.loop import Progress
from minilora.training.progress import ProgressBar, time_left

PNG = b"\x89PNG\r\n\x1a\n"
HISTORY = History(
    train=[(step, 3.0 / step**0.5) for step in range(1, 41)],
    held_out=[(0, 3.1), (20, 1.0), (40, 0.6)],
)


def progress(step, held_out=None, loss=2.5):
    return Progress(step, 40, loss, held_out, 12345.6, 75.0 - step)


# --- progress ----------------------------------------------------------------------------------


def test_plain_lines_where_there_is_no_terminal(capsys):
    with ProgressBar(40, "adapt") as report:
        report(progress(10))
        report(progress(20, held_out=2.25))
        report(progress(30))
    out, err = capsys.readouterr()
    assert out == ""
    assert err.splitlines() == [
        "adapt: step 10/40, loss 2.500, 12,346 tokens/s, 1:05 left",
        "adapt: step 20/40, loss 2.500, held-out 2.250, 12,346 tokens/s, 0:55 left",
        "adapt: step 30/40, loss 2.500, held-out 2.250, 12,346 tokens/s, 0:45 left",
    ]


def test_a_bar_on_a_terminal(monkeypatch, capsys):
    monkeypatch.setattr(sys, "stderr", Terminal())
    monkeypatch.setenv("COLUMNS", "120")
    with ProgressBar(40, "adapt") as report:
        report(progress(20, held_out=2.25))
        report(progress(40, loss=1.5))
    shown = sys.stderr.getvalue()
    assert "\n" not in shown.rstrip("\n")  # one line, written again and again
    last = shown.rstrip("\n").split("\r")[-1]
    assert last.startswith("adapt: 100%|")
    assert "40/40" in last
    assert "loss 1.500, held-out 2.250, 12,346 tokens/s, 0:35 left" in last
    assert capsys.readouterr().out == ""


def test_a_resumed_run_starts_in_the_middle_of_the_bar(monkeypatch):
    monkeypatch.setattr(sys, "stderr", Terminal())
    with ProgressBar(40, "adapt") as report:
        report(progress(30))
    assert "75%" in sys.stderr.getvalue()
    assert "30/40" in sys.stderr.getvalue()


def test_an_error_before_the_first_report_stands_alone(monkeypatch):
    monkeypatch.setattr(sys, "stderr", Terminal())
    with pytest.raises(MiniloraError), ProgressBar(40, "adapt"):
        raise MiniloraError("too short")
    assert sys.stderr.getvalue() == ""


@pytest.mark.parametrize(
    ("seconds", "expected"),
    [
        (0, "0:00"),
        (9.6, "0:10"),
        (59.6, "1:00"),
        (61, "1:01"),
        (3599.9, "1:00:00"),
        (7384, "2:03:04"),
    ],
)
def test_time_left(seconds, expected):
    assert time_left(seconds) == expected


# --- plots -------------------------------------------------------------------------------------


def test_smoothing_is_a_weighted_mean_of_what_came():
    assert smoothed((2.0,)) == [2.0]
    assert smoothed((3.0,) * 5) == pytest.approx([3.0] * 5)
    assert smoothed((1.0, 3.0), decay=0.5) == pytest.approx([1.0, (0.5 * 1 + 1 * 3) / 1.5])


def test_a_plot_is_a_png_with_something_on_it(tmp_path):
    pytest.importorskip("matplotlib")
    from matplotlib.image import imread

    path = tmp_path / "losses.png"
    plot_losses(HISTORY, path, title="a $text$ of $\\nothing$")
    data = path.read_bytes()
    assert data.startswith(PNG)
    width, height = struct.unpack(">II", data[16:24])
    assert (width, height) == (1050, 600)
    pixels = imread(path)[..., :3]
    for color in ("#d94801", "#2171b5", "#9ecae1"):  # held out, smoothed, every batch
        wanted = [int(color[i : i + 2], 16) / 255 for i in (1, 3, 5)]
        near = (abs(pixels - wanted) < 0.02).all(axis=-1)
        assert near.sum() > 50, f"no curve in {color}"
        columns = near.any(axis=0).nonzero()[0]
        assert columns.max() - columns.min() > width / 2, f"the curve in {color} is short"
    assert [p.name for p in tmp_path.iterdir()] == ["losses.png"]


@pytest.mark.parametrize("name", ["losses.svg", "losses.PDF"])
def test_other_kinds_of_file(tmp_path, name):
    pytest.importorskip("matplotlib")
    plot_losses(HISTORY, tmp_path / name, title="text")
    assert (tmp_path / name).read_bytes()[:5] in (b"<?xml", b"%PDF-")


@pytest.mark.parametrize(
    "history", [History([], [(0, 1.0)]), History([(1, 2.0)], [(0, 1.0), (1, 2.0)])]
)
def test_a_short_history_can_be_drawn(tmp_path, history):
    pytest.importorskip("matplotlib")
    plot_losses(history, tmp_path / "losses.png", title="text")
    assert (tmp_path / "losses.png").read_bytes().startswith(PNG)


@pytest.mark.parametrize("name", ["losses", "losses.txt", "losses.png.bak", ".png"])
def test_a_name_that_says_no_kind_is_refused(tmp_path, name):
    with pytest.raises(MiniloraError, match="--plot .* ends in .png or .svg or .pdf"):
        check_plot(tmp_path / name)


def test_without_matplotlib_the_extra_is_named(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(MiniloraError, match="pip install matplotlib"):
        check_plot(tmp_path / "losses.png")


@pytest.mark.parametrize("name", ["losses.png", "losses.svg", "losses.pdf", "losses.PDF"])
def test_a_plot_of_the_same_losses_is_the_same_file(tmp_path, monkeypatch, name):
    """At another time, which matplotlib would write into it, and in another process."""
    pytest.importorskip("matplotlib")
    code = (
        "import sys; from minilora.cli.plot import plot_losses; "
        "from minilora.training.checkpoint import History; "
        "plot_losses(History([(1, 2.0), (2, 1.5)], [(0, 2.5), (2, 1.0)]), sys.argv[1], title='x')"
    )
    found = []
    for run in range(2):
        path = tmp_path / str(run) / name
        path.parent.mkdir()
        monkeypatch.setenv("SOURCE_DATE_EPOCH", str(10**9 * run))
        subprocess.run([sys.executable, "-c", code, str(path)], check=True)
        found.append(path.read_bytes())
    assert found[0] == found[1]
