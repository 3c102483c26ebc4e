"""Calling the hooks of an epoch's start in a run that resumes within the epoch.

Lightning leaves them out there. What they set, such as a temperature or a counter, has to be set
again; what they change of the state that the checkpoint restored, such as parameters, has to be
undone.
"""

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.loggers.logger import DummyLogger
from torch.nn import Module

Flags = dict[str, bool]  # by "name:flag"


def module_flags(module: Module) -> Flags:
    """Return `requires_grad` of each parameter, and how each submodule is switched."""
    flags = {
        f"{name}:requires_grad": parameter.requires_grad
        for name, parameter in module.named_parameters()
    }
    for name, one in module.named_modules():
        flags[f"{name}:training"] = one.training
        if hasattr(one, "track_running_stats"):  # of BatchNorm; BaseFinetuning changes it
            flags[f"{name}:track_running_stats"] = one.track_running_stats
    return flags


def set_module_flags(module: Module, flags: Flags) -> None:
    """Set what `module_flags` returned; what is no longer there is left out."""
    owners: dict[str, Any] = {**dict(module.named_modules()), **dict(module.named_parameters())}
    for key, value in flags.items():
        name, _, flag = key.rpartition(":")
        if name in owners:
            setattr(owners[name], flag, value)


@contextmanager
def state_kept(trainer: Trainer, module: LightningModule) -> Iterator[None]:
    """Undo what hooks change of the restored state; what else they set stays. Nothing is logged."""
    loggers = trainer.loggers
    tensors = [
        (tensor, tensor.detach().to("cpu", copy=True))
        for tensor in (*module.parameters(), *module.buffers())
    ]
    flags = module_flags(module)
    options = [
        [{**group, "params": None} for group in optimizer.param_groups]
        for optimizer in trainer.optimizers
    ]
    states = [dict(optimizer.state) for optimizer in trainer.optimizers]
    callbacks = [(one, copy.deepcopy(one.state_dict())) for one in at_epoch_start(trainer)]
    trainer.loggers = [DummyLogger() for _ in loggers]
    try:
        yield
    finally:
        trainer.loggers = loggers
    with torch.no_grad():
        for tensor, value in tensors:
            tensor.copy_(value)
    set_module_flags(module, flags)
    for optimizer, groups, state in zip(trainer.optimizers, options, states, strict=True):
        restore_optimizer(optimizer, groups, state)
    for callback, kept in callbacks:
        if kept:
            callback.load_state_dict(kept)


def at_epoch_start(trainer: Trainer) -> Iterator[Callback]:
    """Yield the callbacks that do something at an epoch's start."""
    callbacks: list[Callback] = trainer.callbacks  # type: ignore[attr-defined]
    for callback in callbacks:
        if type(callback).on_train_epoch_start is not Callback.on_train_epoch_start:
            yield callback


def restore_optimizer(optimizer: Any, groups: list[dict[str, Any]], state: Any) -> None:
    """Put back the options and the state of an optimizer."""
    for group, options in zip(optimizer.param_groups, groups, strict=False):
        group.update({name: value for name, value in options.items() if name != "params"})
    optimizer.state.clear()
    optimizer.state.update(state)
