"""Evaluation on the way, on the command line: of rows that are not trained on, without a trace in what is trained."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

from pt_jax import checks
from pt_jax.training import loop


@dataclasses.dataclass(frozen=True, kw_only=True)
class Evaluating:
    """Options of every training command that say how it is evaluated on its way.

    Args:
      eval_data: rows that are not trained on. sft and dpo give their loss and metrics (eval_loss and so on), grpo
        answers them greedily (eval_reward).
      eval_every: steps between two evaluations, beside one before the first step and one after the last; a tenth of
        the run when not given.
      patience: end after so many evaluations in a row that were no better than the best before them.
    """

    eval_data: str | None = None
    eval_every: int | None = None
    patience: int | None = None


PREFIX = "eval_"  # of the metrics


def check(options) -> None:
    """Fails with a sentence when the options make no sense.

    Args:
      options: of a training command, with those of ``keeping`` too.
    """
    for name in ("eval_every", "patience"):
        if (value := getattr(options, name)) is not None:
            flag = "--" + name.replace("_", "-")
            checks.positive(flag, value)
            if options.eval_data is None:
                raise ValueError(f"{flag} {value} is of evaluations; give --eval-data")
    if (kept := options.keep_best) is not None and kept.startswith(PREFIX):
        if options.eval_data is None:
            raise ValueError(f"--keep-best {kept} is of evaluations; give --eval-data")
        if options.eval_every is None or options.checkpoint_every % options.eval_every:
            raise ValueError(
                f"--keep-best {kept}: every checkpoint must be evaluated; give an --eval-every that divides "
                f"--checkpoint-every {options.checkpoint_every}"
            )


def best(metric: str):
    """For the best of some values of a metric: min if its name ends in loss, else max.

    >>> best("eval_loss")([2.0, 1.0]), best("eval_reward")([2.0, 1.0])
    (1.0, 2.0)
    """
    return min if metric.endswith("loss") else max


class Evaluations:
    """The evaluations of a run: when there is one, and whether they say that it is to end.

    Args:
      options: of the command.
      steps: of the run.
      metric: that patience looks at.
      evaluate: state -> metrics, on the device or not. It is a function of the state alone, and has no state itself.
    """

    def __init__(self, options: Evaluating, steps: int, metric: str, evaluate):
        self.every = options.eval_every or -(-steps // 10)
        self.steps, self.patience, self.metric, self.evaluate = steps, options.patience, metric, evaluate
        self.history: list[float] = []  # of the metric, where patience needs it; part of a checkpoint

    def __call__(self, state) -> dict:
        """The metrics of a state, which are remembered."""
        found = self.evaluate(state)
        if self.patience is not None:
            self.history.append(float(found[self.metric]))
        return found

    def over(self) -> bool:
        """Whether patience has run out."""
        better = best(self.metric)
        return self.patience is not None and loop.out_of_patience(self.history, self.patience, better)

    def after(self, step, state, metrics):
        """For ``callbacks`` of ``loop.fit``."""
        if step % self.every and step != self.steps:
            return None
        found = self(state)
        if self.over():
            raise loop.EndOfTraining(**found)
        return found


def of_loss(loss_fn, batch, *, rows: int, place):
    """A function of ``(params, frozen)``: the loss and its metrics over a batch of any size, with eval_ in front.

    The weights of a loss are of the whole batch, so what parts of it give adds up (see ``weights``).

    Args:
      loss_fn: ``(params, frozen, batch, key) -> (loss, metrics)``; all metrics are scalars.
      batch: of a recipe, arrays of the host.
      rows: that are worked through at a time.
      place: puts so many rows where they are worked through.
    """
    count = len(jax.tree.leaves(batch)[0])
    fill = lambda x: np.concatenate([x, np.zeros((-count % rows, *x.shape[1:]), x.dtype)])  # of weight 0
    batch = jax.tree.map(fill, batch)
    parts = [jax.tree.map(lambda x: x[i : i + rows], batch) for i in range(0, count, rows)]  # noqa: B023
    program = jax.jit(lambda params, frozen, batch: loss_fn(params, frozen, batch, jax.random.key(0)))

    def evaluate(params, frozen) -> dict:
        total = None
        for part in parts:
            loss, metrics = program(params, frozen, place(part))
            found = {PREFIX + name: x for name, x in {"loss": loss, **metrics}.items()}
            total = found if total is None else jax.tree.map(jnp.add, total, found)
        return total

    return evaluate
