"""The loop loses no step, fetches once an interval, and goes on where a state was left."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from pt_jax.training import init_state, loop, make_train_step

OPTIMIZER = optax.sgd(0.1, momentum=0.9)


def distance(params, frozen, batch, key):
    gap = params["w"][None] - batch["x"] + (0 if frozen is None else frozen)
    noise = jax.random.normal(key, gap.shape)  # a step that took another key would show
    return jnp.sum(gap**2 + noise * gap) / 4, {"rows": gap[:, 0], "mean": gap.mean()}


STEP = make_train_step(distance, OPTIMIZER)


def batch_of_step(i):
    return {"x": np.random.default_rng(i).normal(size=(4, 2)).astype(np.float32)}


def new_state():
    return init_state({"w": jnp.zeros(2)}, OPTIMIZER, jax.random.key(0))


def fit(state, steps, batch_of_step=batch_of_step, **options):
    seen = []
    state = loop.fit(
        state, STEP, batch_of_step, steps=steps, on_metrics=lambda *x: seen.append(x), **options
    )  # fmt: skip
    return state, seen


def test_the_metrics_of_every_step_come_in_order_as_floats():
    state, seen = fit(new_state(), 7, log_every=3)
    assert [number for number, _ in seen] == [1, 2, 3, 4, 5, 6, 7]
    assert int(state.step) == 7
    by_hand = new_state()
    for i, (_, values) in enumerate(seen):
        by_hand, metrics = STEP(by_hand, None, batch_of_step(i))
        assert values.keys() == {"loss", "mean", "grad_norm", "skipped"}  # what a row has stays on the device
        assert values == {name: float(metrics[name]) for name in values}
        assert {type(v) for v in values.values()} == {float}


@pytest.mark.parametrize(("steps", "log_every", "fetches"), [(12, 4, 3), (12, 5, 3), (3, 10, 1), (3, 1, 3)])
def test_metrics_are_fetched_once_an_interval(monkeypatch, steps, log_every, fetches):
    calls, device_get = [], jax.device_get

    def counted(tree):
        calls.append([number for number, _ in tree])
        return device_get(tree)

    monkeypatch.setattr(jax, "device_get", counted)
    _, seen = fit(new_state(), steps, log_every=log_every)
    assert len(calls) == fetches
    assert [n for call in calls for n in call] == [number for number, _ in seen] == [*range(1, steps + 1)]


def test_how_often_is_looked_changes_no_result():
    states = [fit(new_state(), 6, log_every=n)[0] for n in (1, 4, 100)]
    for other in states[1:]:
        jax.tree.map(np.testing.assert_array_equal, states[0].params, other.params)


@pytest.mark.parametrize("left_at", [1, 2, 5, 6])
def test_a_state_goes_on_from_its_step_to_the_last_bit(left_at):
    straight, expected = fit(new_state(), 6, log_every=4)
    state, first = fit(new_state(), left_at, log_every=4)
    asked = []

    def remembered(i):
        asked.append(i)
        return batch_of_step(i)

    state, rest = fit(state, 6, remembered, log_every=4)
    assert asked == [*range(left_at, 6)]
    assert first + rest == expected
    of = lambda s: (s.params, s.opt_state, s.step)
    jax.tree.map(np.testing.assert_array_equal, of(state), of(straight))


def test_a_run_that_is_done_does_nothing():
    state, _ = fit(new_state(), 3)
    again, seen = fit(state, 3, lambda i: pytest.fail("a batch was made"))
    assert (int(again.step), seen) == (3, [])


def test_what_is_frozen_reaches_the_loss():
    (_, plain), (_, shifted) = fit(new_state(), 1), fit(new_state(), 1, frozen=jnp.float32(100))
    assert shifted[0][1]["loss"] > 100 * plain[0][1]["loss"]


@pytest.mark.parametrize("norm", [np.nan, np.inf])
def test_a_gradient_that_is_not_finite_ends_the_run_though_the_loss_is(norm):
    seen = []
    with pytest.raises(FloatingPointError, match=r"the gradient's norm of step 7 is (nan|inf); a lower learning rate"):
        loop.report(7, {"loss": 1.0, "grad_norm": np.float32(norm)}, lambda *x: seen.append(x))
    assert len(seen) == 1


def with_bad(bad, *steps):
    return lambda i: {"x": batch_of_step(i)["x"] + (bad if i in steps else 0)}


@pytest.mark.parametrize("bad", [np.nan, np.inf])
@pytest.mark.parametrize("log_every", [1, 10])
def test_losses_that_are_not_finite_in_a_row_end_the_run_and_name_the_step(bad, log_every):
    seen = []
    with pytest.raises(FloatingPointError, match=r"the loss of step 6 is (nan|inf); a lower learning rate") as raised:
        loop.fit(
            new_state(), STEP, with_bad(bad, 2, 4, 5, 6), steps=9, log_every=log_every, bad_steps=2,
            on_metrics=lambda number, values: seen.append((number, values["skipped"])),
        )  # fmt: skip
    # what led there is logged, what came after it is not; a good step between two bad ones forgives the first
    assert seen == [(1, 0), (2, 0), (3, 1), (4, 0), (5, 1), (6, 1)]
    assert raised.value.step == 5 and np.isfinite(raised.value.state.params["w"]).all()


def test_a_row_of_bad_steps_is_counted_across_two_processes():
    state, _ = fit(new_state(), 4, with_bad(np.nan, 2, 3), bad_steps=3)
    with pytest.raises(FloatingPointError, match="of step 5"):
        fit(state, 9, with_bad(np.nan, 4), bad_steps=3)


def test_a_step_that_does_not_skip_ends_the_run_at_once():
    def bare(state, frozen, batch):
        state, metrics = STEP(state, frozen, batch)
        return state, {k: v for k, v in metrics.items() if k != "skipped"}

    with pytest.raises(FloatingPointError, match="the loss of step 3 is nan"):
        loop.fit(new_state(), bare, with_bad(np.nan, 2), steps=6, on_metrics=lambda *_: None)


def test_a_skip_for_another_reason_is_given_up_as_well():
    seen = []
    for number in (1, 2):
        loop.report(number, {"loss": 1.0, "skipped": 1}, lambda *x: seen.append(x))
    with pytest.raises(FloatingPointError, match="step 3 and those before it were skipped"):
        loop.report(3, {"loss": 1.0, "skipped": 1}, lambda *x: seen.append(x), may_skip=False)
    assert len(seen) == 3


def test_an_iterator_of_batches_is_taken_in_order():
    one, two = fit(new_state(), 4), fit(new_state(), 4, map(batch_of_step, range(4)))
    assert one[1] == two[1]


def test_an_iterator_that_is_too_short_is_told_by_the_step():
    state, _ = fit(new_state(), 2)
    said = "batch_of_step: ends before step 5; it had 2 batches, and training from step 2 to 6 takes 4"
    with pytest.raises(ValueError, match=said):
        fit(state, 6, map(batch_of_step, range(2, 4)))


def test_a_callback_sees_every_step_adds_metrics_and_changes_nothing():
    calls = []

    def norm(step, state, metrics):
        calls.append((step, int(state.step), "loss" in metrics))
        return {"norm": float(jnp.sum(state.params["w"] ** 2))} if step % 2 == 0 else None

    plain, watched = fit(new_state(), 5), fit(new_state(), 5, callbacks=(norm, loop.at(5, lambda state: {"last": 1})))
    jax.tree.map(np.testing.assert_array_equal, plain[0].params, watched[0].params)
    assert calls == [(n, n, True) for n in range(1, 6)]
    assert [sorted(v.keys() - plain[1][0][1].keys()) for _, v in watched[1]] == [[], ["norm"], [], ["norm"], ["last"]]
    assert [{k: v[k] for k in plain[1][0][1]} for _, v in watched[1]] == [v for _, v in plain[1]]


def test_a_callback_may_end_the_training_after_its_step():
    def enough(step, state, metrics):
        if step == 3:
            raise loop.EndOfTraining(why=1.5)

    state, seen = fit(new_state(), 9, callbacks=(enough,))
    assert int(state.step) == 3 and [n for n, _ in seen] == [1, 2, 3] and seen[-1][1]["why"] == 1.5


def test_a_training_that_has_come_to_its_end_is_not_stopped():
    def enough(step, state, metrics):
        if step == 3:
            raise loop.EndOfTraining

    state, _ = fit(new_state(), 9, callbacks=(enough,), stop=lambda step: "SIGINT" if step == 3 else None)
    assert int(state.step) == 3


@pytest.mark.parametrize(
    ("values", "over"),
    [
        ([], False), ([1.0], False), ([1.0, 1.0], False), ([1.0, 1.0, 1.0], True), ([3.0, 2.0, 1.0, 1.5], False),
        ([np.nan, np.nan], True), ([1.0, np.nan, 2.0], True), ([np.nan, 5.0, 6.0], False),
    ],
)  # fmt: skip
def test_patience_is_over_when_the_best_is_so_far_back(values, over):
    assert loop.out_of_patience(values, 2) is over
    assert loop.out_of_patience([-v for v in values], 2, max) is over


def saver(n):
    saved = []
    return saved, loop.every(n, lambda step, state, values: saved.append((step, int(state.step), values)))


def test_what_is_saved_has_been_reported_and_is_of_that_step():
    saved, save = saver(3)
    _, seen = fit(new_state(), 7, log_every=100, save=save)
    assert [(step, at) for step, at, _ in saved] == [(3, 3), (6, 6)]
    assert [values for *_, values in saved] == [seen[2][1], seen[5][1]]
    assert [n for n, _ in seen] == [*range(1, 8)]
    assert fit(new_state(), 7, log_every=100)[1] == seen


def test_a_reason_to_stop_saves_and_is_told_with_the_state():
    saved, save = saver(None)
    seen = []
    with pytest.raises(loop.Stopped, match="SIGTERM") as raised:
        loop.fit(
            new_state(), STEP, batch_of_step, steps=9, on_metrics=lambda n, _: seen.append(n), save=save,
            stop=loop.first_of(lambda step: None, lambda step: "SIGTERM" if step >= 4 else None),
        )  # fmt: skip
    assert [(step, at) for step, at, _ in saved] == [(4, 4)] and seen == [1, 2, 3, 4]
    assert int(raised.value.state.step) == raised.value.step == 4 and raised.value.code == 75


def test_a_reason_that_is_there_before_the_first_step_stops_before_it():
    saved, save = saver(1)
    with pytest.raises(loop.Stopped) as raised:
        fit(new_state(), 9, lambda i: pytest.fail("a batch was made"), save=save, stop=lambda step: "SIGINT")
    assert saved == [] and raised.value.step == 0


def test_a_run_that_is_done_is_not_stopped():
    assert int(fit(new_state(), 3, stop=lambda step: "SIGINT" if step == 3 else None)[0].step) == 3


def test_a_time_limit_counts_from_when_it_was_made():
    now = [100.0]
    stop = loop.time_limit(10, clock=lambda: now[0])
    assert stop(1) is None
    now[0] = 110.0
    assert stop(2) == "the time limit of 10 seconds"
    stop = loop.time_limit(10, clock=lambda: now[0], spent=4)
    now[0] = 115.9
    assert stop(1) is None
    now[0] = 116.0
    assert stop(2) == "the time limit of 10 seconds"


def test_a_step_is_compiled_ahead_once_and_says_what_it_takes(caplog):
    step, state, batch = make_train_step(distance, OPTIMIZER), new_state(), batch_of_step(0)
    with jax.log_compiles():
        said = loop.compiled(step, state, None, batch)
        state, _ = step(state, None, batch)
    assert len([r for r in caplog.messages if "Finished XLA compilation of jit(train_step)" in r]) == 1
    held = sum(x.nbytes for x in jax.tree.leaves((state.params, state.opt_state, batch)))
    assert said.arguments >= held and said.seconds > 0 and "compiled in" in str(said) and int(state.step) == 1


def test_a_profile_is_of_the_steps_that_were_asked_for(monkeypatch, tmp_path):
    calls, now = [], []
    monkeypatch.setattr(jax.profiler, "start_trace", lambda folder, **_: calls.append(("start", now[-1])))
    monkeypatch.setattr(jax.profiler, "stop_trace", lambda: calls.append(("stop", now[-1])))
    for steps, expected in (
        (9, [("start", 2), ("stop", 5)]),
        (4, [("start", 2), ("stop", 4)]),
        (2, [("start", 2), ("stop", 2)]),
    ):
        profile = loop.Profile(tmp_path, 3, 5)
        fit(new_state(), steps, callbacks=(lambda step, *_: now.append(step), profile))
        profile.close()
        assert calls == expected
        calls.clear()
    with pytest.raises(ValueError, match="needs 2 <= first <= last"):
        loop.Profile(tmp_path, 1, 5)


def test_metrics_that_are_not_there_yet_are_fetched_once_the_next_step_runs(monkeypatch):
    """Else the device would wait for the host to make the next batch."""
    handed, reported = [], []

    def slow(state, frozen, batch):
        handed.append(len(handed) + 1)
        return STEP(state, frozen, batch)

    monkeypatch.setattr(type(jnp.zeros(())), "is_ready", lambda self: False)
    loop.fit(
        new_state(), slow, batch_of_step, steps=7, log_every=3,
        on_metrics=lambda step, _: reported.append((step, len(handed))),
    )  # fmt: skip
    assert reported == [(1, 4), (2, 4), (3, 4), (4, 7), (5, 7), (6, 7), (7, 7)]
    monkeypatch.setattr(type(jnp.zeros(())), "is_ready", lambda self: True)
    handed.clear(), reported.clear()
    loop.fit(
        new_state(), slow, batch_of_step, steps=7, log_every=3,
        on_metrics=lambda step, _: reported.append((step, len(handed))),
    )  # fmt: skip
    assert reported == [(1, 3), (2, 3), (3, 3), (4, 6), (5, 6), (6, 6), (7, 7)]


def test_a_profile_can_be_opened(tmp_path):
    profile = loop.Profile(tmp_path, 2, 3)
    fit(new_state(), 4, callbacks=(profile,))
    names = [p.name for p in tmp_path.rglob("*") if p.is_file()]
    assert any(name.endswith(".xplane.pb") for name in names) and "perfetto_trace.json.gz" in names
