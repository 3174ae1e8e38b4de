"""What the training commands share: the run from data to folder."""

import contextlib
import math
import shutil
from functools import partial

import jax
import numpy as np

from pt_jax import checks, folders, signals
from pt_jax.commands import adapters, common, keeping, runs, several
from pt_jax.data import batches
from pt_jax.models import lora
from pt_jax.tracking import metrics
from pt_jax.training import capture, distributed, init_state, loop, make_stages, make_train_step, sharding


class Fit:
    """The part of a training command that all share: optimiser, placement, steps, and the folder at the end.

    What is trained is ``state.params``; ``frozen`` is what the step takes beside it: with adapters, the model's own
    weights.
    """

    def __init__(self, options: common.Training, model: common.Model, loss_fn, count: int):
        self.options, self.model, self.count = options, model, count
        self.noted = keeping.noted(options)  # of the files as they were read; they may change while this trains
        self.steps = options.steps or max(1, math.ceil(options.epochs * count / options.batch_size))
        self.mesh = common.mesh_of(options)
        hold, parts = jax.device_count() // (options.tensor * options.context), options.microbatches
        self.parts = hold * parts  # that the rows of a batch are split into
        if options.batch_size % self.parts:
            raise ValueError(
                f"--batch-size {options.batch_size} must be a multiple of {self.parts}: its rows are split over "
                f"{hold} devices and {parts} microbatches"
            )
        self.updates = self.steps * getattr(options, "updates", 1)
        optimizer = common.optimizer_of(options, self.updates)
        self.how, self.frozen, trained = adapters.of(options), None, model.params
        key = jax.random.key(options.seed)
        if self.how is not None:
            self.frozen = sharding.place(model.params, sharding.by_name(model.params, self.mesh)), None
            own_key = jax.random.fold_in(key, common.SEEDS - 1)  # no step's
            trained = jax.jit(lora.init, static_argnums=2)(own_key, model.params, self.how)
            loss_fn = lora.adapted(loss_fn, self.how)
        trained = sharding.place(trained, sharding.by_name(trained, self.mesh))
        begin = partial(init_state, optimizer=optimizer, key=key)
        layout = sharding.by_name(jax.eval_shape(begin, trained), self.mesh)
        self.state = jax.jit(begin, out_shardings=layout)(trained)  # moments are made where they will lie
        self.done, self.saved, self.tracker = 0, None, None  # see ``stage``
        loss_fn = sharding.within(self.mesh, loss_fn)
        self.train_step = make_train_step(loss_fn, optimizer, microbatches=options.microbatches, shardings=layout)
        if options.profile is not None and options.profile[1] > self.steps:
            first, last = options.profile
            raise ValueError(f"--profile {first} {last}: the run has {self.steps} steps; give steps that it has")
        for update in options.capture:
            checks.between("--capture", update, 0, self.updates)
        if options.capture:
            stages = jax.jit(make_stages(loss_fn, optimizer, microbatches=options.microbatches))
            folder = runs.unfinished(options.out) / "steps"
            self.train_step = capture.recording(self.train_step, stages, folder, options.capture)

    @property
    def params(self):
        """The model as it is now, for everything that asks it."""
        return self.params_of(self.state)

    def params_of(self, state):
        """The model of a state."""
        return state.params if self.how is None else lora.attach(self.frozen[0], state.params, self.how)

    def reference(self):
        """The model before training, which stays: with adapters their base, else a copy."""
        return jax.tree.map(lambda x: x.copy(), self.state.params) if self.how is None else self.frozen[0]

    def place(self, batch):
        """A batch with its rows and tokens split over the mesh."""
        return sharding.place(batch, sharding.of_batch(batch, self.mesh))

    def rows_of_step(self, step: int) -> np.ndarray:
        return batches.rows_of_step(self.count, self.options.batch_size, step, seed=self.options.seed)

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
            if jax.process_count() > 1:
                several.check_same(self.noted, done)
            if done is not None:
                self._resume(done)
            with runs.stage(self.options, name, self.steps, None, done) as (self.tracker, on, logs):
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
        keeping.check_inputs(self.saved.meta(step), self.options)
        distributed.everybodys("restored")  # none is to read what is removed
        if several.writes():
            self.saved.go_on_from(step)
        self.done = step

    def run(self, batch_of_step, on, *, step=None, callbacks=(), bad_batch=None) -> None:
        """All steps that are not done.

        Args:
          batch_of_step: step number -> batch of arrays with rows in front; what ``step`` takes, when that is given.
          on: the stage that metrics are reported to.
          step: ``(state, frozen, batch) -> (state, metrics)``; the train step when None.
          callbacks: see ``loop.fit``.
          bad_batch: step number -> the arrays that it trained on; ``batch_of_step`` when None.
        """
        options, batch_of = self.options, batch_of_step
        if step is None:
            batch_of = lambda i: self.place(batch_of_step(i))
            if self.done < self.steps:
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

    def records(self) -> list[dict]:
        """What the run has logged so far, in earlier processes too; nothing where the log is another's."""
        return [] if self.saved is None else metrics.read(runs.unfinished(self.options.out) / "metrics.jsonl")

    def show(self, step: int, samples) -> None:
        """Adds some samples of a step to samples.jsonl in the run's own folder, if it has one."""
        if self.saved is None:
            return
        try:
            metrics.append(runs.unfinished(self.options.out) / "samples.jsonl", step, samples)
        except OSError as e:
            self.tracker.warn(f"the samples of step {step} were not written: {e.strerror}")

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
            keeping.check_metric(self.options, step, values)
            self.saved.save(step, state, metrics=values, meta=self.noted)

        every = loop.every(self.options.checkpoint_every, save, self.saved.poll)
        return {"save": every, "stop": keeping.stop(self.options)}

    def save(self, logs=()) -> None:
        """The trained model as a folder, with copies of these files beside it; fails when it is not a number."""
        trained, model = distributed.fetched(self.state.params), self.model
        base = None if self.how is None else distributed.fetched(self.frozen[0])
        for path, x in jax.tree_util.tree_leaves_with_path(trained):
            if not np.isfinite(x).all():
                name = jax.tree_util.keystr(path, simple=True, separator=".")
                raise FloatingPointError(
                    f"{name} is not finite, so nothing is saved; a lower learning rate usually helps"
                )
        if not several.writes():
            return
        with folders.appear_whole(self.options.out, overwrite=self.options.overwrite) as folder:
            adapters.write(folder, self.options, model, trained, base)
            for log in logs:
                shutil.copy2(log, folder)
            if logs:
                runs.draw(folder)
