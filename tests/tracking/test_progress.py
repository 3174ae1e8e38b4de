"""Progress: the right rate and time left by a clock that the test turns, on a terminal and without one."""

import functools
import io
import re
import subprocess
import sys

import pytest
import rich.console
from rich.table import Table

from pt_jax.tracking import lines
from pt_jax.tracking.progress import Progress, Stage

HIDE, SHOW = "\x1b[?25l", "\x1b[?25h"
# a Console that does not look at the variables of the machine the test runs on
Console = functools.partial(rich.console.Console, _environ={"TERM": "xterm-256color"})


class Clock:
    now = 0.0

    def __call__(self):
        return self.now


@pytest.fixture
def clock():
    return Clock()


@pytest.fixture
def out():
    return io.StringIO()


def plain(out, clock, stages, **options):
    console = Console(file=out, width=80, force_terminal=False, force_interactive=False)
    return Progress(stages, console=console, clock=clock, **options)


def terminal(out, clock, stages, width=80):
    console = Console(file=out, width=width, force_terminal=True, force_interactive=True, color_system=None)
    return Progress(stages, console=console, clock=clock)


def walk(clock, stage, steps, seconds, **metrics):
    for _ in range(steps):
        clock.now += seconds
        stage.advance(**metrics)


def drawn(progress, clock, width=80):
    file = io.StringIO()
    Console(file=file, width=width, color_system=None).print(lines.Display(progress, clock()))
    return file.getvalue().splitlines()


# ---- rate and time left


def test_the_rate_leaves_out_the_compilation_before_the_first_step(clock):
    stage = Stage("sft", 100, clock, lambda *_: None)
    walk(clock, stage, 1, 60.0)
    assert stage.rate() is None and stage.left(clock()) is None
    walk(clock, stage, 10, 0.5)
    assert stage.rate() == pytest.approx(2.0)
    assert stage.left(clock()) == pytest.approx(89 / 2.0)


@pytest.mark.parametrize("log_every", [2, 10])
def test_steps_that_are_reported_together_were_not_done_together(clock, log_every):
    """The loop fetches metrics once an interval, and then reports every step of it."""
    stage = Stage("sft", 100, clock, lambda *_: None)
    for burst in range(1, 5):
        clock.now += log_every  # one step a second
        for i in range(log_every):
            clock.now += 1e-4
            stage.reach((burst - 1) * log_every + i + 1)
        assert stage.rate() == pytest.approx(1.0, rel=1e-2)
        assert stage.left(clock()) == pytest.approx(100 - burst * log_every, rel=1e-2)


def test_a_first_report_of_several_steps_has_a_rate_that_the_next_ones_correct(clock):
    stage = Stage("sft", 100, clock, lambda *_: None)
    for seconds, rate in ((30, 1 / 3), (10, 1.0), (10, 1.0)):  # the first ones wait for a compilation
        clock.now += seconds
        stage.advance(10)
        assert stage.rate() == pytest.approx(rate)


def test_steps_faster_than_the_clock_is_read_have_their_rate(clock):
    stage = Stage("sft", 10_000, clock, lambda *_: None)
    walk(clock, stage, 3000, 0.001)
    assert stage.rate() == pytest.approx(1000, rel=0.05)


def test_the_rate_follows_a_change_of_pace(clock):
    stage = Stage("grpo", 1000, clock, lambda *_: None)
    walk(clock, stage, 100, 0.1)
    walk(clock, stage, 101, 1.0)
    assert stage.rate() == pytest.approx(1.0)


def test_the_rate_holds_over_more_steps_than_are_remembered(clock):
    stage = Stage("sft", 20_000, clock, lambda *_: None)
    walk(clock, stage, 15_000, 0.25)
    assert stage.rate() == pytest.approx(4.0)
    assert stage.left(clock()) == pytest.approx(5000 / 4)
    assert len(stage._marks) < 5000


def test_time_left_counts_down_between_reports_and_waits_for_one_that_is_overdue(clock):
    stage = Stage("sft", 100, clock, lambda *_: None)
    for done in (10, 20, 30):
        clock.now += 10
        stage.reach(done)
    assert stage.left(clock()) == pytest.approx(70)
    clock.now += 4
    assert stage.left(clock()) == pytest.approx(66)
    clock.now += 1000  # an evaluation
    assert stage.left(clock()) == pytest.approx(60)


def test_the_same_step_again_brings_metrics_and_no_progress(clock):
    stage = Stage("sft", 10, clock, lambda *_: None)
    walk(clock, stage, 3, 1.0, loss=2.0)
    clock.now += 5
    stage.reach(3, **{"eval_reward": 0.5})
    assert stage.done == 3 and stage.rate() == pytest.approx(1.0)
    assert stage.metrics == {"loss": 2.0, "eval_reward": 0.5}


def test_time_left_of_all_scales_the_guesses_by_what_was_measured(out, clock):
    with plain(out, clock, {"sft": 10, "dpo": 20, "grpo": 30}) as p:
        assert p.left(clock()) == (0, 60, True)  # nothing measured: the guesses are seconds
        with p.stage("sft", 11) as s:
            assert p.left(clock()) == (10, 60, False)
            clock.now += 4
            assert p.left(clock()) == (6, 56, False)  # it counts down through a compilation
            walk(clock, s, 1, 6.0)
            walk(clock, s, 5, 1.0)  # 15 s gone, 5 to go: 20 s where 10 were guessed
            assert p.left(clock()) == pytest.approx((5, 5 + 2 * 50, True))
            walk(clock, s, 5, 1.0)
        clock.now += 7  # a pause between stages
        assert p.left(clock()) == pytest.approx((0, 2 * 50, True))
        with p.stage("dpo", 20):
            here, everything, timed = p.left(clock())
            assert not timed and everything > here > 0


def test_a_stage_left_out_is_not_waited_for(out, clock):
    with plain(out, clock, {"pretrain": 50, "sft": 10, "dpo": 40}) as p:
        with p.stage("sft", 10):
            assert p.left(clock())[1] == pytest.approx(50)
            assert p.share() == pytest.approx(0.5)
        with p.stage("dpo", 10) as s:
            walk(clock, s, 5, 1.0)
            assert p.share() == pytest.approx(0.8)
        assert p.share() == 1.0


# ---- without a terminal


def test_plain_lines_say_count_rate_time_left_and_metrics(out, clock):
    with plain(out, clock, {"sft": 30}) as p, p.stage("sft", 300) as s:
        walk(clock, s, 101, 0.25, loss=1.2345678)
    text = out.getvalue()
    assert "sft  80/300  4.0 step/s  0:55 left  0:20 gone  loss 1.235\n" in text
    assert text.splitlines()[-1].startswith("sft  101/300  4.0 step/s  done")
    assert "\x1b" not in text


def test_plain_lines_come_at_start_and_end_and_every_interval_and_are_never_folded(out, clock):
    stages = {"a long name of a stage": 30, "sft": 5}
    with plain(out, clock, stages, interval=10.0) as p, p.stage("a long name of a stage", 400) as s:
        walk(clock, s, 390, 0.125, loss=1.0, reward=0.123456, kl=0.123456, entropy=0.123456, other=3.0)
    got = out.getvalue().splitlines()
    assert [re.search(r"(\d+)/400", line)[1] for line in got] == ["0", "80", "160", "240", "320", "390"]
    assert all("(all " in line and line.endswith(" left)") for line in got)
    assert "other" not in got[-1] and "entropy" in got[-1]


def test_shown_metrics_are_those_asked_for(out, clock):
    with plain(out, clock, {"sft": 1}, show=("c",)) as p, p.stage("sft", 1) as s:
        s.advance(a=1, b=2, loss=3, d=4, c=5)
    assert out.getvalue().splitlines()[-1].endswith("c 5  a 1  b 2  loss 3")


def test_a_quiet_console_shows_nothing_and_swallows_no_print(capsys, clock):
    with Progress(
        {"sft": 1}, console=Console(quiet=True, force_terminal=True, force_interactive=True), clock=clock
    ) as p:
        p.print("nothing")
        print("kept")
        with p.stage("sft", 1) as s:
            s.advance(loss=1.0)
    assert capsys.readouterr() == ("kept\n", "")


# ---- on a terminal


@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError])
def test_an_interruption_shows_the_cursor_again_and_goes_on(out, clock, error):
    with pytest.raises(error), terminal(out, clock, {"sft": 1, "dpo": 1}) as p, p.stage("sft", 10) as s:
        assert HIDE in out.getvalue()
        s.advance(3)
        raise error
    text = out.getvalue()
    assert text.rindex(SHOW) > text.rindex(HIDE)
    assert "3/10" in text and re.search(r"\nall .* 15% .* stopped", text)


def test_what_is_printed_stands_above_the_live_lines(out, clock):
    with terminal(out, clock, {"sft": 1}) as p, p.stage("sft", 10):
        table = Table("head")
        table.add_row("a result")
        p.print(table)
    text = out.getvalue()
    assert "a result" in text and text.rindex("0/10") > text.rindex("a result")


@pytest.mark.parametrize("width", [60, 80, 160])
def test_live_lines_hold_every_stage_and_fit_the_terminal(out, clock, width):
    with plain(out, clock, {"pretrain": 10, "sft": 10, "grpo": 80}) as p:
        with p.stage("pretrain", 300) as s:
            walk(clock, s, 300, 0.5, loss=2.0)
        with p.stage("sft", 100_000) as s:
            walk(clock, s, 21, 0.25, loss=1.5, **{"rewards/margins": 0.5, "rewards/accuracies": 0.75, "kl": 0.01})
            got = drawn(p, clock, width)
    assert max(map(len, got)) <= width and len(got) == (4 if width == 160 else 6)
    if width == 60:  # cut short, not folded
        assert "…" in "".join(got)
        return
    text = "\n".join(got)
    assert re.search(r"pretrain +━+ +300/300 +2.0 step/s +done +2:30 gone", text)
    assert re.search(r"sft +─+ +21/100000 +4.0 step/s +6:56:35 left +0:05 gone", text)
    assert "loss 1.5  rewards/margins 0.5  rewards/accuracies 0.75  kl 0.01" in text
    assert re.search(r"\ngrpo +─+\s", text) and re.search(r"\nall +━━─+ +10% ", text)


def test_one_stage_needs_no_line_for_all(out, clock):
    with plain(out, clock, {"sft": 10}) as p, p.stage("sft", 4) as s:
        s.advance(2)
        (line,) = drawn(p, clock)
    assert line.startswith("sft  ━━━━━━━━━━━━────────────  ") and "(all" not in out.getvalue()


# ---- bad input


def test_stages_out_of_turn_are_sentences(out, clock):
    p = plain(out, clock, {"sft": 1, "dpo": 1})
    with pytest.raises(ValueError, match="with Progress"), p.stage("sft", 1):
        pass
    with pytest.raises(ValueError, match="with Progress"):
        p.print("x")
    with p:
        with pytest.raises(ValueError, match=r"'grpo' is not one of \['sft', 'dpo'\]"), p.stage("grpo", 1):
            pass
        with pytest.raises(ValueError, match="total must be at least 0, got -1"), p.stage("sft", -1):
            pass
        with p.stage("sft", 1), pytest.raises(ValueError, match="while 'sft' runs"), p.stage("dpo", 1):
            pass
        with pytest.raises(ValueError, match="has run before"), p.stage("sft", 1):
            pass
        with p.stage("dpo", 0):  # a stage of no steps is none to stumble over
            drawn(p, clock)


@pytest.mark.parametrize("stages", [{}, {"sft": -1}, {"sft": float("nan")}, {"sft": float("inf")}])
def test_stages_that_cannot_be_weighed_are_a_sentence(stages):
    with pytest.raises(ValueError, match="stages"):
        Progress(stages)


def test_importing_tracking_loads_neither_jax_nor_rich_nor_matplotlib():
    code = (
        "import sys; from pt_jax.tracking import lines, metrics, plots, progress, tables, tracker\n"
        "print([m for m in ('jax', 'rich', 'matplotlib', 'numpy') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
