"""What a tree of arrays is made of, by name: to compare what was saved with what is wanted before either is touched."""

import jax
import numpy as np


def flat(tree) -> dict:
    """The leaves of a tree by the names on their path; None is no leaf.

    Raises:
      ValueError: two leaves have one name.

    >>> flat({"layers": {"wq": 1.0}, "step": 3, "averages": None})
    {'layers.wq': 1.0, 'step': 3}
    """
    out = {}
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
        name = jax.tree_util.keystr(path, simple=True, separator=".")
        if name in out:
            raise ValueError(f"two leaves of the tree are called {name}; names of keys must not contain dots")
        out[name] = leaf
    return out


def unflat(leaves: dict, like):
    """The tree of ``like`` with these leaves, by name."""
    return jax.tree.unflatten(jax.tree.structure(like), [leaves[name] for name in flat(like)])


def spec(tree) -> dict[str, str]:
    """Name to type and shape, in words.

    >>> spec({"w": np.zeros((2, 3), np.float32), "key": jax.random.key(0)})
    {'key': 'key<fry>[]', 'w': 'float32[2,3]'}
    """
    return {name: _words(leaf) for name, leaf in flat(tree).items()}


def _words(leaf) -> str:
    leaf = leaf if hasattr(leaf, "dtype") else np.asarray(leaf)
    return f"{leaf.dtype}[{','.join(map(str, leaf.shape))}]"


def difference(saved: dict[str, str], wanted: dict[str, str]) -> str | None:
    """How two specs differ, in words; None when they do not. The first leaf is named, the others are counted.

    >>> difference({"w": "float32[2,3]"}, {"w": "float32[2,4]", "b": "float32[4]"})
    'w is float32[2,3] there and float32[2,4] here, and 1 more leaf differs'
    """
    said = [f"{name} is {saved[name]} there and {x} here" for name, x in wanted.items() if saved.get(name, x) != x]
    said += [f"{name} is not there" for name in wanted if name not in saved]
    said += [f"{name} is there and not here" for name in saved if name not in wanted]
    if not said:
        return None
    more = len(said) - 1
    return said[0] + (f", and {more} more {'leaf differs' if more == 1 else 'leaves differ'}" if more else "")
