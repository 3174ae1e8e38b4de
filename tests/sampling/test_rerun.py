"""Another process draws the same bits, by every engine."""

import json
import os
import subprocess
import sys

PROGRAM = """
import functools, hashlib, jax, json, numpy as np
jax.config.update("jax_platforms", "cpu")
jax.config.update("jax_num_cpu_devices", 8)
from pt_jax.models import Config, bind, init
from pt_jax.sampling import Draft, Sampling, sample, sample_queue, sample_until, speculate

config = Config(vocab=23, layers=2, width=8, heads=2, kv_heads=1, head_width=4, hidden=8)
model, params = bind(config), jax.tree.map(lambda x: x * 10, init(config, jax.random.key(1)))
prompts, seen = np.arange(20, dtype=np.int32).reshape(4, 5), np.tril(np.ones((5, 5), bool))[1:, ::-1]
settings = {"apply": model.apply, "init_cache": model.init_cache, "length": 9, "end_tokens": (3,), "pad_token": 3,
    "group": 2, "how": Sampling(0.9, 12, 0.95, 0.01)}
jit = functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})
near = Draft(jax.tree.map(lambda x: x * 1.05, params), *model)
engines = {
    "sample": jit(functools.partial(sample, **settings)),
    "queue": jit(functools.partial(sample_queue, slots=3, **settings)),
    "until": functools.partial(sample_until, chunk=5, **settings),
    "look-up": jit(lambda *x: speculate(*x, **settings)[0]),
    "draft": jit(lambda *x: speculate(*x, draft=near, **settings)[0]),
}
said = {}
for name, by in engines.items():
    out = by(params, prompts, seen, jax.random.key(2))
    digests = [hashlib.sha256(np.asarray(x).tobytes()).hexdigest() for x in (out.tokens, out.logps, out.alive)]
    said[name] = digests, np.asarray(out.tokens).tolist()
print(json.dumps(said))
"""


def test_another_process_samples_the_same_bits():
    """Each comes to an end, too: 23 tokens times 4 prompts of 2 samples were a program that XLA never finished."""
    ask, env = [sys.executable, "-c", PROGRAM], os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    runs = [subprocess.Popen(ask, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=env) for _ in range(2)]
    try:
        ended = [run.communicate(timeout=240) for run in runs]
    finally:
        for run in runs:
            run.kill()
    assert [run.returncode for run in runs] == [0, 0], ended
    first, second = (json.loads(out) for out, _ in ended)
    assert first == second and len(first) == 5
    tokens = [tokens for _, tokens in first.values()]
    assert all(x == tokens[0] for x in tokens) and len({tuple(row) for row in tokens[0]}) == 8
