"""``pt-jax inspect`` counts as transformers counts."""

import copy

import pytest
from model_cases import CASES

from pt_jax.commands import inspect
from pt_jax.models import huggingface, parameters

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

ONE_EACH = {family: next(case for case in CASES if CASES[case][0] == family) for family, _ in CASES.values()}


def of_transformers(case, head="CausalLM"):
    family, fields = CASES[case]
    config = transformers.AutoConfig.for_model(
        family, vocab_size=37, num_labels=1, pad_token_id=None, **copy.deepcopy(fields)
    )
    with torch.device("meta"):
        return getattr(transformers, f"AutoModelFor{head}").from_config(config)


@pytest.mark.parametrize("case", CASES)
def test_parameters_are_counted_as_transformers_counts_them(case, tmp_path):
    model = of_transformers(case)
    model.config.save_pretrained(tmp_path)
    config = huggingface.read_config(tmp_path)
    assert parameters.count(parameters.shapes(config)) == model.num_parameters()


@pytest.mark.parametrize("case", [ONE_EACH["gpt2"], ONE_EACH["mixtral"], ONE_EACH["phi3"]])
@pytest.mark.parametrize("head", ["CausalLM", "SequenceClassification"])
def test_a_whole_folder_is_counted_so(case, head, tmp_path):
    model = of_transformers(case, head)
    model = model.to_empty(device="cpu")
    model.tie_weights()
    model.save_pretrained(tmp_path)
    found = inspect.examine(tmp_path)
    assert found["parameters"] == model.num_parameters()
    assert found["class"] == type(model).__name__
