"""The experiments show what their docstrings say."""

import importlib.util
import pathlib

EXPERIMENTS = pathlib.Path(__file__).parents[1] / "experiments"


def test_grpo_teaches_a_model_to_say_seven():
    spec = importlib.util.spec_from_file_location("grpo_one_page", EXPERIMENTS / "grpo_one_page.py")
    page = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(page)
    rewards = page.main()
    assert rewards[0] < 0.15 and sum(rewards[-3:]) / 3 > 0.9
