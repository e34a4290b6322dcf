"""A Trainer whose optimizer is that of the model as it now is: pruning puts other parameters in place of the old."""

import weakref
from typing import Any, NoReturn, cast

import torch
from torch import nn
from transformers import Trainer

from .config import MRPFConfig
from .optimizer_arguments import adam_arguments
from .resumable import ResumableTrainer


class OptimizingTrainer(ResumableTrainer):
    """`Trainer` that makes its optimizer afresh where the model was pruned since; its arguments are `Trainer`'s."""

    args: MRPFConfig

    def __init__(self, **kwargs: Any):
        super().__init__(**kwargs)
        self._remember(self.accelerator.unwrap_model(self.model))

    @property
    def _made_own_optimizer(self) -> bool:
        return self.__dict__.get("_own_optimizer", False)

    def create_optimizer(self, *args, **kwargs):
        """As in `Trainer`."""
        self._own_optimizer = self.optimizer is None or self._made_own_optimizer
        return super().create_optimizer(*args, **kwargs)

    @staticmethod
    def get_optimizer_cls_and_kwargs(args, model=None):
        """As in `Trainer`; `"adam"` is `torch.optim.Adam`."""
        if args.optim == "adam":
            return torch.optim.Adam, adam_arguments(args)
        return Trainer.get_optimizer_cls_and_kwargs(args, model)

    def _prepare_for_training(self, *args, **kwargs):
        # An evaluation before training marks the bare model as prepared, and DDP would then silently be left out.
        model = self._without_autocast()
        model.__dict__.pop("_is_accelerate_prepared", None)
        if self._optimises_others():
            if not self._made_own_optimizer:
                self._refuse_optimizer()
            self._start_afresh(model)
        self._remember(model)
        self._has_trained = True
        given = self.optimizer
        try:
            return super()._prepare_for_training(*args, **kwargs)
        finally:
            # Not by create_optimizer alone, which a subclass may override.
            if given is None:
                self._own_optimizer = self.optimizer is not None

    def _trained(self) -> bool:
        # `compress` prunes without the trainer's knowing.
        return super()._trained() and not self._optimises_others()

    def _optimises_others(self) -> bool:
        """Whether the model was pruned, say by `compress`, since the optimizer was made: it holds what was replaced."""
        if self.optimizer is None:
            return False
        if self.is_fsdp_enabled or self.is_deepspeed_enabled:  # they give it parameters of their own
            return False
        own = {id(parameter) for parameter in self.accelerator.unwrap_model(self.model).parameters()}
        gone = {id(parameter) for seen in self._of_model if (parameter := seen()) is not None} - own
        # One that was given may hold less than the model, or more.
        groups = cast(Any, self.optimizer).param_groups
        return any(id(parameter) in gone for group in groups for parameter in group["params"])

    def _remember(self, model: nn.Module) -> None:
        self._of_model = [weakref.ref(parameter) for parameter in model.parameters()]

    def _refuse_optimizer(self) -> NoReturn:
        raise ValueError(
            "The model was pruned after the optimizer was made, which would go on with the weights of before. Use "
            "trainer.prune(plan) before a training or between two, with a trainer that was given no optimizer."
        )

    def _start_afresh(self, model: nn.Module) -> None:
        """Forgets the parameters before pruning and their training: they are no longer the model's."""
        self._remember(model)
        self.model = self.model_wrapped = model
        self.optimizer = self.lr_scheduler = None
        self._created_lr_scheduler = self._own_optimizer = False
        self._has_trained = False
        for name in ("model", "optimizer", "lr_scheduler"):
            setattr(self.callback_handler, name, getattr(self, name))
        self.accelerator.free_memory()

    def training_step(self, *args, **kwargs):
        """As in `Trainer`; a ValueError where a callback has pruned the model under its optimizer."""
        if self.optimizer is None or self._optimises_others():
            self._refuse_optimizer()
        return super().training_step(*args, **kwargs)
