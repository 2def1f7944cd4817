"""Train a model (Sec. 4.2, Training): `python -m unept.train [PRESET] [--options]`."""

import inspect
import itertools
import sys
from dataclasses import fields
from pathlib import Path
from typing import Literal

import tyro

from . import cli, distributed
from .config import RENAMED, DataConfig, ModelConfig, TrainConfig
from .data import check_splits
from .evaluation.evaluator import format_table
from .model.backbone import close_names
from .presets import PRESETS
from .pretrained import has_model
from .recipe import RecipeConfig
from .training.fine_tuning import network_of
from .training.interruption import Stopped
from .training.run_folder import find_run, reserved
from .training.trainer import Trainer


def parse(args: list[str] | None = None) -> tuple[str, TrainConfig]:
    """Return the name of the preset and the configuration that a command line asks for; None reads `sys.argv`."""
    args = list(sys.argv[1:] if args is None else args)
    if not args or (args[0].startswith("-") and args[0] not in ("-h", "--help")):
        _require_no_preset(args)
        args.insert(0, "shapes")
    elif args[0] not in (*PRESETS, "-h", "--help"):
        close = close_names(args[0], PRESETS)
        raise ValueError(
            f"there is no preset {args[0]!r}{close}: give one that python -m unept.train --help lists, or only options"
        )
    name, *options = args
    # The help says what a preset is and what to expect of it; its docstring in unept/presets/ has the rest.
    about = {name: (inspect.getdoc(preset) or "").split("\nSize:")[0] for name, preset in PRESETS.items()}
    if name not in PRESETS:
        tyro.extras.overridable_config_cli(
            {name: (about[name], preset()) for name, preset in PRESETS.items()},
            prog="python -m unept.train",
            description="Train a model. Without a preset it is shapes; PRESET --help lists the options of a preset.",
            args=args,
            config=(tyro.conf.OmitArgPrefixes,),
            registry=cli.REGISTRY,
        )
    preset = PRESETS[name]()
    if (source := _value(options, "--init-from")) is not None:
        preset.model = _network(args, source, preset.model)
    config = tyro.cli(
        TrainConfig,
        default=preset,
        prog=f"python -m unept.train {name}",
        description=about[name],
        args=[_current_name(argument) for argument in options],
        config=(tyro.conf.OmitArgPrefixes,),
        registry=cli.REGISTRY,
    )
    return name, config


def _require_no_preset(args: list[str]) -> None:
    """Raise ValueError if a preset stands behind other options, where it is no option's value."""
    parts = (TrainConfig, ModelConfig, DataConfig, RecipeConfig)
    switches = {f"--{field.name.replace('_', '-')}" for part in parts for field in fields(part) if field.type is bool}
    for before, argument in itertools.pairwise(args):
        is_value = before.startswith("-") and "=" not in before and before not in switches and before[:5] != "--no-"
        if argument in PRESETS and not is_value:
            raise ValueError(f"the preset comes first: python -m unept.train {argument} {args[0]} ...")


def _network(args: list[str], source: str, preset: ModelConfig) -> ModelConfig:
    """Return the network of --init-from, unless other options change it.

    A run that continues has it in its folder, so that the trained model may be gone. With another --backbone than that
    of the trained model, the backbone starts as the preset says, and images are normalised as it expects.
    """
    out = _value(args, "--out")
    resume: Literal["auto", "never"] = "auto" if _value(args, "--resume") == "auto" else "never"
    run = find_run(TrainConfig(out=None if out is None else Path(out), resume=resume), args[0])
    if run is not None:
        return TrainConfig.from_json(run / "config.json").model
    network = network_of(source)
    if _value(args, "--backbone") not in (None, network.backbone):
        network.pretrained_backbone = preset.pretrained_backbone
        if network.in_chans == 3:
            network.mean = network.std = None
    if _value(args, "--in-chans") not in (None, str(network.in_chans)):
        network.mean = network.std = None
    return network


def _value(args: list[str], option: str) -> str | None:
    """Return the last value of an option on a command line that is not parsed yet; None if it is missing or "None"."""
    found = None
    for argument, value in zip(args, [*args[1:], None], strict=False):
        name, separator, inline = argument.partition("=")
        if name.replace("_", "-") == option:
            given = inline if separator else value
            found = None if given is None or given == "None" or given.startswith("--") else given
    return found


def _current_name(argument: str) -> str:
    """Replace the old name of an option (`unept.config.RENAMED`) by its present one."""
    name, separator, value = argument.partition("=")
    for old, new in RENAMED.items():
        if name.replace("_", "-") == f"--{old.replace('_', '-')}":
            name = f"--{new.replace('_', '-')}"
    return name + separator + value


def train(args: list[str] | None = None) -> int:
    """Train as a command line asks (`unept.config.TrainConfig`) and print the final table.

    Under torchrun every process runs this function; rank 0 writes and prints.

    Args:
        args: the command line; None reads `sys.argv`.

    Returns:
        The exit status: 0, or 128 + the number of the signal that has stopped the run.

    Raises:
        ValueError, OSError: options, data or weights cannot be used; the message says what to do.
        FloatingPointError: a loss or a weight became NaN or infinite.
        MemoryError: the memory of the GPU or of the machine is used up.
    """
    preset, config = parse(args)
    if config.check_data:
        cli.refuse_several_processes()
        check_splits(config.data.build, config.data.workers)
        return 0
    device = distributed.choose_device(config.device)
    with distributed.process_group(device), reserved(config, preset) as out:
        trainer = Trainer(config, out, device)
        try:
            scores = trainer.train()
        except Stopped as stopped:
            if distributed.is_main():
                print(stopped, file=sys.stderr)
            return stopped.exit_status
        if distributed.is_main():
            if trainer.step < config.iterations:
                print(f"Stopped after step {trainer.step}: {trainer.stale} evaluations were not better than the best")
            print(format_table(scores, trainer.model.classes))
            print_results(trainer)
    return 0


def print_results(trainer: Trainer) -> None:
    """Print where the results of a run are, as far as they are there."""
    out = trainer.out
    cli.say("")
    cli.say(f"Run folder  {out}")
    if has_model(out):
        cli.say(f"Model       {out / 'model'} (best validation mIoU {trainer.best:.4f})")
    if pictures := [path for path in (out / "samples", out / "curves.png") if path.is_file() or any(path.glob("*"))]:
        cli.say(f"Pictures    {', '.join(map(str, pictures))}")
    if has_model(out):
        cli.say(f"Try it      python -m unept.predict IMAGE --run {out}")


def main() -> None:
    """Run the command line."""
    cli.run(train)


if __name__ == "__main__":
    main()
