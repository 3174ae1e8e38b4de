"""Training: the state, the one step that serves every loss, where arrays live, and the loop."""

from pt_jax.training.step import TrainState, init_state, make_stages, make_train_step

__all__ = ["TrainState", "init_state", "make_stages", "make_train_step"]
