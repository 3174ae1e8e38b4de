import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pt_jax.losses import preference

PARAMS = {"w": jnp.array([[1.0, 2.0]]), "layers": [jnp.array([4.0])]}
REFERENCE = {"w": jnp.array([[3.0, 2.0]]), "layers": [jnp.array([-4.0])]}


def test_a_step_towards_the_policy():
    got = jax.jit(preference.soft_update)(PARAMS, REFERENCE, alpha=0.25)
    np.testing.assert_allclose(got["w"], [[2.5, 2.0]])
    np.testing.assert_allclose(got["layers"][0], [-2.0])


@pytest.mark.parametrize(("alpha", "expected"), [(1.0, PARAMS), (0.0, REFERENCE)])
def test_the_ends_are_the_hard_update_and_no_update(alpha, expected):
    jax.tree.map(np.testing.assert_array_equal, preference.soft_update(PARAMS, REFERENCE, alpha=alpha), expected)


def test_many_small_steps_come_near_the_policy():
    reference = REFERENCE
    for _ in range(50):
        reference = preference.soft_update(PARAMS, reference, alpha=0.1)
    np.testing.assert_allclose(reference["layers"][0], 4 - 8 * 0.9**50, rtol=1e-5)


def test_the_reference_keeps_its_type():
    half = jax.tree.map(lambda x: x.astype(jnp.bfloat16), REFERENCE)
    assert {x.dtype for x in jax.tree.leaves(preference.soft_update(PARAMS, half))} == {jnp.dtype(jnp.bfloat16)}
    assert {x.dtype for x in jax.tree.leaves(preference.soft_update(half, PARAMS))} == {jnp.dtype(jnp.float32)}


@pytest.mark.parametrize(
    ("reference", "message"),
    [
        ({"w": REFERENCE["w"]}, "ref_params has another structure than params"),
        (
            REFERENCE | {"w": jnp.zeros((1, 3))},
            r"ref_params\['w'\] has shape \(1, 3\), expected that of params, \(1, 2\)",
        ),
        (REFERENCE | {"w": jnp.zeros((1, 2), int)}, "ref_params must be of a float type"),
    ],
)
def test_a_reference_of_another_model_is_refused(reference, message):
    with pytest.raises(ValueError, match=message):
        preference.soft_update(PARAMS, reference)


@pytest.mark.parametrize("alpha", [-0.1, 1.1, float("nan")])
def test_an_alpha_that_is_no_share_is_refused(alpha):
    with pytest.raises(ValueError, match=r"alpha must be in \[0, 1\]"):
        preference.soft_update(PARAMS, REFERENCE, alpha=alpha)
