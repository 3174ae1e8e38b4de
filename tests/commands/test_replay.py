"""``pt-jax replay`` names the stage at which two recorded steps part."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from pt_jax import cli
from pt_jax.commands import sft
from pt_jax.training import capture, init_state, make_stages

SGD = optax.sgd(0.1)


@pytest.fixture(scope="module")
def steps(tmp_path_factory):
    """Three folders: a step, the same one, and one that scales its gradient and not its loss."""
    folder = tmp_path_factory.mktemp("steps")
    batch = {"x": np.float32([[1, 2], [3, 4]])}

    def loss_fn(params, frozen, batch, key, scale=1.0):
        w = params["w"]
        return (batch["x"] @ (w + (scale - 1) * (w - jax.lax.stop_gradient(w)))).sum(), {}

    for name, scale in (("a", 1.0), ("again", 1.0), ("b", 2.0)):
        stages = jax.jit(make_stages(lambda *x, scale=scale: loss_fn(*x, scale=scale), SGD))
        state = init_state({"w": jnp.ones(2)}, SGD, jax.random.key(0))
        capture.record(folder / name, stages, state, None, batch)
    return folder


@pytest.mark.parametrize(
    ("other", "said"),
    [
        ("again", "the same step, to the last bit"),
        ("b", "parts at the stage gradients (2 of 2 entries differ, the most 6.0 and 12.0 at [1] in w); the same until "
              "then: batch, frozen, before, metrics"),
    ],
)  # fmt: skip
def test_it_says_where_two_steps_part(steps, capsys, other, said):
    assert cli.main(["replay", str(steps / "a"), str(steps / other)]) == 0
    assert capsys.readouterr().out == said + "\n"


def test_a_folder_that_is_no_step_gets_a_sentence(steps, tmp_path, capsys):
    assert cli.main(["replay", str(steps / "a"), str(tmp_path)]) == 2
    assert "has no capture.json; give a folder that a step was recorded in" in capsys.readouterr().err


@pytest.fixture(scope="module")
def runs(folder, data, tmp_path_factory):
    """Runs of two steps that are both recorded, at two rates."""
    outs = []
    for rate in (1e-2, 2e-2):
        outs.append(tmp_path_factory.mktemp("runs") / "out")
        sft.run(
            sft.SFT(
                model=str(folder), data=data["completion"], out=str(outs[-1]), steps=2, batch_size=8,
                learning_rate=rate, capture=(0, 1),
            )
        )  # fmt: skip
    return outs


@pytest.mark.parametrize(("step", "stage"), [("0", "updates"), ("1", "before")])
def test_two_runs_at_two_rates_part_at_their_first_update(runs, step, stage):
    found = capture.compare(*(out / "steps" / step for out in runs))
    assert {x.stage for x in found} == {stage}
    assert not runs[0].with_name("out.unfinished").exists()


def test_a_step_that_the_run_has_not_is_refused(folder, data, tmp_path):
    options = sft.SFT(
        model=str(folder), data=data["completion"], out=str(tmp_path / "out"), steps=2, batch_size=8, capture=(2,)
    )
    with pytest.raises(ValueError, match=r"--capture must be in \[0, 2\), got 2"):
        sft.run(options)
    assert list(tmp_path.iterdir()) == []
