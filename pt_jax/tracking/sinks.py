"""Logs beside ``metrics.jsonl``: TensorBoard and Weights & Biases, imported when they are asked for."""

import importlib.util
import pathlib

PACKAGES = {"tensorboard": "tensorboardX", "wandb": "wandb"}


def check(names) -> None:
    """Fails with a sentence when the package of one of these logs is not installed."""
    for name in names:
        if importlib.util.find_spec(PACKAGES[name]) is None:
            raise ValueError(f"--track {name} needs {PACKAGES[name]}; pip install 'pt_jax[{name}]'")


def opened(name: str, folder, config: dict, after: int = 0):
    """One of ``PACKAGES``, writing below a run's folder.

    Args:
      name: of the log.
      folder: of the run.
      config: its options.
      after: the step that the run goes on from; what an earlier process logged of later ones is replaced.
    """
    return {"tensorboard": TensorBoard, "wandb": WeightsAndBiases}[name](folder, config, after)


class TensorBoard:
    """Scalars as ``stage/metric`` in FOLDER/tensorboard."""

    name = "TensorBoard"

    def __init__(self, folder, config, after=0):
        from tensorboardX import SummaryWriter

        self._writer = SummaryWriter(logdir=str(pathlib.Path(folder) / "tensorboard"), purge_step=after + 1)
        self._writer.add_text("options", "\n".join(f"    {name}: {value}" for name, value in config.items()), after)

    def log(self, step: int, stage: str, **metrics: float) -> None:
        for name, value in metrics.items():
            self._writer.add_scalar(f"{stage}/{name}", value, step)

    def close(self) -> None:
        self._writer.close()


class WeightsAndBiases:
    """Scalars as ``stage/metric`` of one run, which a resumed process goes on with."""

    name = "Weights & Biases"

    def __init__(self, folder, config, after=0):
        import wandb

        folder = pathlib.Path(folder) / "wandb"
        folder.mkdir(exist_ok=True)
        known = folder / "id"
        identity = known.read_text() if after and known.is_file() else wandb.util.generate_id()
        known.write_text(identity)
        self._run = wandb.init(dir=str(folder.parent), config=config, id=identity, resume="allow")

    def log(self, step: int, stage: str, **metrics: float) -> None:
        self._run.log({f"{stage}/{name}": value for name, value in metrics.items()}, step=step)

    def close(self) -> None:
        self._run.finish()
