"""The optimiser, its learning rates (Sec. 4.2, Training) and the average of the weights."""

import math
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.optim.lr_scheduler import LambdaLR
from torch.optim.swa_utils import AveragedModel

from ..config import TrainConfig
from ..model.output import TrainableModel


def build_optimizer(model: TrainableModel, config: TrainConfig) -> torch.optim.AdamW:
    """Return AdamW with a learning rate of its own for the backbone; the backbone is the second parameter group.

    With `layer_decay` or without `decay_norms` there are more groups: by layer of the backbone, and by weight decay.
    """
    backbone = {id(p): name for name, p in model.backbone.named_parameters()}
    scales = layer_scales(model, config.recipe.layer_decay)
    spared = set() if config.recipe.decay_norms else without_decay(model)
    groups: dict[tuple[bool, float, float], list[nn.Parameter]] = {}
    for name, parameter in model.named_parameters():
        inside = backbone.get(id(parameter))
        decay = 0.0 if name in spared else config.weight_decay
        scale = 1.0 if inside is None else scales.get(inside, 1.0)
        groups.setdefault((inside is not None, scale, decay), []).append(parameter)
    ordered = sorted(groups.items(), key=lambda group: group[0][0])  # stable: the order of the parameters is kept
    rates = (config.lr, config.backbone_lr)
    on_gpu = all(parameter.is_cuda for parameter in model.parameters())
    return torch.optim.AdamW(
        [
            {"params": params, "lr": rates[inside] * scale, "weight_decay": decay}
            for (inside, scale, decay), params in ordered
        ],
        betas=config.betas,
        fused=on_gpu or None,
    )


def layer_scales(model: TrainableModel, factor: float) -> dict[str, float]:
    """Return what the learning rate of each parameter of the backbone is multiplied by, by its name in the backbone.

    The last layer has 1, and each layer before it `factor` times that of the next (Clark et al. 2020, ELECTRA).
    """
    if factor == 1:
        return {}
    layers = model.backbone.layers()
    last = max(layers.values())
    return {f"features.{name}": factor ** (last - layer) for name, layer in layers.items()}


def without_decay(model: TrainableModel) -> set[str]:
    """Return the names of the biases, of the parameters of normalisations, and of those that timm's model names.

    The bias of the sampling points has a row per head, so that its number of axes does not tell what it is.
    """
    backbone = model.backbone  # of another network it may be any module
    special = {f"backbone.features.{name}" for name in getattr(backbone, "without_decay", set[str])()}
    return {name for name, p in model.named_parameters() if p.dim() <= 1 or name.endswith("bias") or name in special}


def clip_gradients(model: TrainableModel, norm: float) -> None:
    """Scale all gradients down where their norm together is larger than `norm`; 0 leaves them alone."""
    if norm:
        nn.utils.clip_grad_norm_(model.parameters(), norm)


def build_scheduler(optimizer: torch.optim.Optimizer, config: TrainConfig) -> LambdaLR:
    """Return the scheduler that multiplies all learning rates by `learning_rate_factor`, to be called every step."""
    return LambdaLR(optimizer, partial(learning_rate_factor, config))


def restore_optimizer(optimizer: torch.optim.Optimizer, scheduler: LambdaLR, state: dict[str, Any], steps: int) -> None:
    """Continue with the moments of a stored optimiser, but with the options that this one was built with.

    Args:
        optimizer: the optimiser, as `build_optimizer` returned it.
        scheduler: its scheduler, as `build_scheduler` returned it.
        state: state dict of the stored optimiser.
        steps: number of steps after which it was stored.
    """
    options = [{name: group[name] for name in group if name != "params"} for group in optimizer.param_groups]
    # PyTorch places the counts of steps by what a group says of `fused`: on the device that this optimiser is on.
    groups = [{**stored, **own} for stored, own in zip(state["param_groups"], options, strict=True)]
    optimizer.load_state_dict({**state, "param_groups": groups})
    scheduler.last_epoch = steps
    for group, own, rate, factor in zip(
        optimizer.param_groups, options, scheduler.base_lrs, scheduler.lr_lambdas, strict=True
    ):
        group.update(own)
        group["lr"] = rate * factor(steps)


def learning_rate_factor(config: TrainConfig, step: int) -> float:
    """Return the factor of the learning rates at a step, which counts from 0."""
    warmup = min(1.0, (step + 1) / config.warmup) if config.warmup else 1.0
    if config.schedule == "step":
        return warmup * (0.1 if step >= config.iterations * config.lr_drop else 1.0)
    if config.schedule == "poly":
        return warmup * (1 - step / config.iterations) ** 0.9
    return warmup * 0.5 * (1 + math.cos(math.pi * step / config.iterations))


def describe_schedule(config: TrainConfig, step: int) -> str:
    """Say in a sentence what the learning rate is at a step, which counts from 0, and how it goes on."""
    rate = config.lr * learning_rate_factor(config, step)
    if config.schedule == "step":
        drop = math.ceil(config.iterations * config.lr_drop)
        rest = f"falls to {0.1 * config.lr:.1e} at step {drop}" if step < drop else "stays there"
    else:
        rest = "falls along a cosine to 0" if config.schedule == "cosine" else "falls as a power of the steps left to 0"
    return f"the learning rate is {rate:.1e} at step {step} of {config.iterations} and {rest}"


class AverageOfWeights(AveragedModel):
    """PyTorch's exponential moving average of a model's weights and buffers, whose update does not wait for a GPU.

    The first update copies the weights; then the decay rises to `decay`, so that the random weights of the start are
    soon forgotten. Integers, such as the number of batches seen, are copied.

    Args:
        model: the model, which is copied.
        decay: the share of the average that stays in an update.
    """

    def __init__(self, model: nn.Module, decay: float):
        super().__init__(model, use_buffers=True)
        self.decay = decay

    @torch.no_grad()
    def update_parameters(self, model: nn.Module) -> None:
        """Average with the weights of a model. PyTorch would copy the number of updates to the GPU; here it stays."""
        updates = int(self.n_averaged)
        weight = 1 - min(self.decay, (1 + updates) / (10 + updates)) if updates else 1.0
        averaged, current = ([*m.parameters(), *m.buffers()] for m in (self.module, model))
        floats = [i for i, tensor in enumerate(averaged) if tensor.is_floating_point()]
        torch._foreach_lerp_([averaged[i] for i in floats], [current[i] for i in floats], weight)
        for old, new in zip(averaged, current, strict=True):
            if not old.is_floating_point():
                old.copy_(new)
        self.n_averaged += 1
