"""What the training commands share: the run from data to folder."""

import contextlib
import math
import shutil
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

from pt_jax import checks, folders, signals
from pt_jax.commands import adapters, common, evaluating, inputs, keeping, optimizing, runs, several
from pt_jax.data import batches
from pt_jax.models import lora
from pt_jax.sampling import Sampling
from pt_jax.tracking import metrics, tables
from pt_jax.training import capture, distributed, init_state, loop, make_stages, make_train_step, references, sharding


class Fit:
    """The part of a training command that all share: optimiser, placement, steps, and the folder at the end.

    What is trained is ``state.params``; ``frozen`` is what the step takes beside it: with adapters, the model's own
    weights.

    Args:
      options: of the command.
      model: of ``common.open_to_train``, whose parameters are taken from it.
      loss_fn: ``(params, frozen, batch, key) -> (loss, metrics)`` of a whole model.
      count: rows to train on.
      follow: of ``references.follow``: the state has a reference, and the loss is given (reference, frozen).
    """

    def __init__(self, options: common.Training, model: common.Model, loss_fn, count: int, follow=None):
        self.options, self.model, self.count = options, model, count
        self.noted = keeping.noted(options)  # of the files as they were read; they may change while this trains
        several.check_same(self.noted)
        self.steps = options.steps or max(1, math.ceil(options.epochs * count / options.batch_size))
        self.updates = self.steps * getattr(options, "updates", 1)
        self.mesh = common.mesh_of(options)
        self.hold = jax.device_count() // (options.tensor * options.context)
        self.parts = self.hold * options.microbatches  # that the rows of a batch are split into
        self._check()
        self.done, self.saved, self.tracker = 0, None, None  # see ``stage``
        self.evaluations: evaluating.Evaluations | None = None  # see ``evaluate``
        self.how, self.frozen, self.before = adapters.of(options), None, None  # see ``reference``
        key, trained = jax.random.key(options.seed), model.give()
        if self.how is not None:
            base = sharding.place(trained, sharding.by_name(trained, self.mesh))
            self.frozen, loss_fn = (base, None), lora.adapted(loss_fn, self.how)
            own_key = jax.random.fold_in(key, common.SEEDS - 1)  # no step's
            trained = jax.jit(lora.init, static_argnums=2)(own_key, base, self.how)
        self.loss_fn = sharding.within(self.mesh, loss_fn)
        optimizer = optimizing.optimizer_of(options, self.updates)

        def begin(params):
            with_reference = {} if follow is None else {"reference": params}
            return init_state(params, optimizer, key, **optimizing.begins_with(options, params), **with_reference)

        trained = sharding.place(trained, sharding.by_name(trained, self.mesh))
        layout = sharding.by_name(jax.eval_shape(begin, trained), self.mesh)
        # what was read becomes what is trained, and moments are made where they will lie
        self.state = jax.jit(begin, out_shardings=layout, donate_argnums=0)(trained)
        around = optimizing.around(options) | {"microbatches": options.microbatches}
        if follow is not None:
            around["after"].append(follow)
            around["frozen_of"] = self._beside_reference
        self.train_step = make_train_step(self.loss_fn, optimizer, shardings=layout, **around)
        if options.capture:
            stages = jax.jit(make_stages(self.loss_fn, optimizer, **around))
            folder = runs.unfinished(options.out) / "steps"
            self.train_step = capture.recording(self.train_step, stages, folder, options.capture)

    def _check(self) -> None:
        """Fails with a sentence when the options do not go with the devices or the number of steps."""
        options = self.options
        if options.batch_size % self.parts:
            raise ValueError(
                f"--batch-size {options.batch_size} must be a multiple of {self.parts}: its rows are split over "
                f"{self.hold} devices and {options.microbatches} microbatches"
            )
        if options.profile is not None and options.profile[1] > self.steps:
            first, last = options.profile
            raise ValueError(f"--profile {first} {last}: the run has {self.steps} steps; give steps that it has")
        for update in options.capture:
            checks.between("--capture", update, 0, self.updates)
        optimizing.check_updates(options, self.updates)

    def _beside_reference(self, state, frozen):
        """What is frozen, as the loss takes it: with the reference of a state."""
        if self.how is None:
            return references.beside(state, frozen)
        base, rest = frozen
        return base, (lora.attach(base, state.reference, self.how), rest)

    def params_of(self, state):
        """The model that is being trained, as it is in a state."""
        return self._model_of(state.params)

    def result_of(self, state):
        """The model that would be written: with --average, the average."""
        return self._model_of(self._written(state))

    def _written(self, state):
        return state.params if self.options.average is None else state.averages

    def _model_of(self, trained):
        return trained if self.how is None else lora.attach(self.frozen[0], trained, self.how)

    def reference(self):
        """The model before training, which stays: with adapters their base, else a copy."""
        if self.how is not None:
            return self.frozen[0]
        self.before = jax.tree.map(lambda x: x.copy(), self.state.params)
        return self.before

    def place(self, batch):
        """A batch with its rows and tokens split over the mesh."""
        return sharding.place(batch, sharding.of_batch(batch, self.mesh))

    def sampler(self, length: int, how: Sampling, slots: int | None = None):
        """``Model.sampler``, its prompts split over the mesh where that divides them; each host has all it gives."""
        draw, whole = self.model.sampler(length, how, slots), sharding.rows(self.mesh)

        def drawn(params, prompts, seen, key, **settings):
            if len(prompts) % self.hold == 0:
                prompts, seen = sharding.place((prompts, seen), whole)
            return distributed.fetched(draw(params, prompts, seen, key, **settings))

        return drawn

    def rows_of_step(self, step: int) -> np.ndarray:
        return batches.rows_of_step(self.count, self.options.batch_size, step, seed=self.options.seed)

    def evaluate(self, metric: str, function) -> None:
        """From here on the run is evaluated on its way.

        Args:
          metric: that patience looks at.
          function: state -> metrics, of the state alone.
        """
        self.evaluations = evaluating.Evaluations(self.options, self.steps, metric, function)

    def evaluate_loss(self, batch) -> None:
        """The same by the loss and its metrics over a batch of any size, of arrays of the host."""
        few = self.hold * -(-len(batch["weights"]) // self.hold)
        rows = min(few, self.options.batch_size // self.options.microbatches)
        of_loss = evaluating.of_loss(self.loss_fn, batch, rows=rows, place=self.place)
        moves = self.state.reference is not None
        frozen_of = lambda state: self._beside_reference(state, self.frozen) if moves else self.frozen
        self.evaluate("eval_loss", lambda state: of_loss(self._written(state), frozen_of(state)))

    @contextlib.contextmanager
    def stage(self, name: str, tracker=None):
        """The stage ``name`` of the run, with its checkpoints: gives (tracker, stage, logs) as ``runs.stage`` does.

        A run of its own, to which no tracker is given, goes on from a checkpoint when it is to, and is stopped by
        signals between two steps.
        """
        if tracker is not None:
            with runs.stage(self.options, name, self.steps, tracker) as (self.tracker, on, logs):
                yield self.tracker, on, logs
            return
        notes = []
        warn = lambda sentence: notes.append(sentence) if self.tracker is None else self.tracker.warn(sentence)
        with signals.deferred(), keeping.opened(self.options, warn) as self.saved:
            several.check_shared(self.options.out)
            done = keeping.step_to_resume(self.options, self.saved)
            distributed.same(step=done)
            if done is not None:
                self._resume(done)
            stage = runs.stage(self.options, name, self.steps, None, done, self.noted["inputs"])
            with stage as (self.tracker, on, logs):
                for sentence in notes:
                    self.tracker.warn(sentence)
                if done is not None:
                    on.latest = self.saved.meta(done)["metrics"]
                    self.tracker.print(f"Goes on from the checkpoint of step {done} in {self.saved.folder}")
                yield self.tracker, on, logs
                self.saved.wait()

    def _resume(self, step: int) -> None:
        """Takes up the state of a step's checkpoint, and removes the later ones; all processes have agreed on it."""
        where = lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding)
        like, self.state = jax.tree.map(where, self.state), None  # there is no room for both
        self.state = self.saved.restore(step, like)
        meta = self.saved.meta(step)
        inputs.check(meta, self.options)
        if self.evaluations is not None:
            self.evaluations.history = meta.get("evaluations", [])
        distributed.everybodys("restored")  # none is to read what is removed
        if several.writes():
            self.saved.go_on_from(step)
        self.done = step

    def run(self, batch_of_step, on, *, step=None, bad_batch=None) -> None:
        """All steps that are not done, with the evaluations between them.

        Args:
          batch_of_step: step number -> batch of arrays with rows in front; what ``step`` takes, when that is given.
          on: the stage that metrics are reported to.
          step: ``(state, frozen, batch) -> (state, metrics)``; the train step when None.
          bad_batch: step number -> the arrays that it trained on; ``batch_of_step`` when None.
        """
        options, batch_of, evaluations, callbacks = self.options, batch_of_step, self.evaluations, []
        if evaluations is not None and self.done and evaluations.over():
            return  # it was killed before its model was there
        if self.saved is not None and self.done < self.steps:
            self.tracker.print(held(self.state, None if self.how is None else self.frozen[0], self.before))
        if step is None:
            batch_of = lambda i: self.place(batch_of_step(i))
            if options.keep_best is not None and self.done < self.steps:
                keeping.check_metric(options, self._names(batch_of(self.done)))
        elif options.keep_best is not None:  # what a step of a command's own says is known once there was one
            own = [] if evaluations is None else [evaluations.metric]
            callbacks.append(lambda _step, _state, metrics: keeping.check_metric(options, [*metrics, *own]))
        if evaluations is not None:
            callbacks.append(evaluations.after)
            if self.done == 0:
                on.step(0, {name: float(x) for name, x in jax.device_get(evaluations(self.state)).items()})
        if step is None and self.done < self.steps:
            self.compile(batch_of(self.done))
        with self._profiled() as profile:
            try:
                self.state = loop.fit(
                    self.state, step or self.train_step, batch_of, steps=self.steps, start=self.done,
                    on_metrics=on.step, log_every=options.log_every, frozen=self.frozen,
                    callbacks=(*callbacks, *profile), bad_steps=options.bad_steps,
                    **({} if self.saved is None else self._kept()),
                )  # fmt: skip
            except FloatingPointError as e:
                if self.saved is not None:
                    keeping.leave_batch(e, (bad_batch or batch_of_step)(e.step), self)
                raise

    def show(self, step: int, samples) -> None:
        """Adds some samples of a step to samples.jsonl in the run's own folder, if it has one."""
        if self.saved is None or not several.writes():
            return
        try:
            metrics.append(runs.unfinished(self.options.out) / "samples.jsonl", step, samples)
        except OSError as e:
            self.tracker.warn(f"the samples of step {step} were not written: {e.strerror}")

    def _names(self, batch) -> list[str]:
        """Of the metrics of the train step for batches like this one, and of its evaluations, before it is compiled."""
        _, metrics = self.train_step.lower(self.state, self.frozen, batch).out_info
        names = [name for name, x in metrics.items() if not x.shape]
        of_loss = [name for name in names if name not in ("grad_norm", "skipped")]
        return names + [evaluating.PREFIX + name for name in of_loss if self.evaluations is not None]

    def compile(self, batch) -> None:
        """Compiles the train step for batches like this one, and prints what it took and takes."""
        said = loop.compiled(self.train_step, self.state, self.frozen, batch)
        self.tracker.print(f"Train step: {said}", soft_wrap=True)

    @contextlib.contextmanager
    def _profiled(self):
        if self.options.profile is None:
            yield ()
            return
        folder = runs.unfinished(self.options.out) / "profile"
        if jax.process_count() > 1:
            folder /= str(jax.process_index())
        with contextlib.closing(loop.Profile(folder, *self.options.profile)) as profile:
            yield (profile,)
        distributed.everybodys("profiled")  # number 0 moves the folder once all have written

    def _kept(self) -> dict:
        """What ``loop.fit`` is given to save and to stop."""

        def save(step, state, values):
            known = [] if self.evaluations is None else [*self.evaluations.history]
            self.saved.save(step, state, metrics=values, meta=self.noted | {"evaluations": known})

        every = loop.every(self.options.checkpoint_every, save, self.saved.poll)
        return {"save": every, "stop": keeping.stop(self.options)}

    def save(self, logs=()) -> None:
        """The trained model as a folder, with copies of these files beside it; fails when it is not a number."""
        trained = self._written(self.state)
        for path, finite in jax.tree_util.tree_leaves_with_path(jax.device_get(_finite(trained))):
            if not finite:
                name = jax.tree_util.keystr(path, simple=True, separator=".")
                raise FloatingPointError(
                    f"{name} is not finite, so nothing is saved; a lower learning rate usually helps"
                )
        if self.how is not None and self.options.fold:
            fold = partial(adapters.folded, self.options)
            layout = sharding.by_name(jax.eval_shape(fold, trained, self.frozen[0]), self.mesh)
            trained = jax.jit(fold, out_shardings=layout)(trained, self.frozen[0])

        def write(trained):
            with folders.appear_whole(self.options.out, overwrite=self.options.overwrite) as folder:
                adapters.write(folder, self.options, self.model, trained)
                for log in logs:
                    shutil.copy2(log, folder)
                if logs:
                    runs.draw(folder)

        distributed.written(write, trained)


@jax.jit
def _finite(tree):
    """Of every array, whether all its numbers are finite; nothing else of it leaves the devices."""
    return jax.tree.map(lambda x: jnp.isfinite(x).all(), tree)


def held(state, base=None, before=None):
    """What lives where, part by part, as a table for the terminal: bytes of all, and on each device.

    Args:
      state: of a run, on its devices.
      base: the weights beneath adapters, or None.
      before: a copy of the weights before training, which stays as a reference, or None.
    """
    parts = {"trained": state.params, "frozen": base, "moments": state.opt_state, "averages": state.averages}
    parts |= {"reference": (state.reference, before)}
    arrays = {name: [x for x in jax.tree.leaves(tree) if hasattr(x, "sharding")] for name, tree in parts.items()}
    size = lambda x, shape: math.prod(shape) * x.dtype.itemsize
    rows = [
        [name, sum(size(x, x.shape) for x in some), sum(size(x, x.sharding.shard_shape(x.shape)) for x in some)]
        for name, some in arrays.items()
        if some
    ]
    rows.append(["together", *(sum(row[i] for row in rows) for i in (1, 2))])
    devices = len(state.step.sharding.device_set)
    return tables.table("what lives where", ["", "bytes", f"on each of {devices}" if devices > 1 else "here"], rows)
