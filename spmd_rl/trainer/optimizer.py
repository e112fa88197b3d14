"""Megatron's DDP wrapper, optimizer and learning-rate schedule, with slime's defaults.

In: model chunks, the configuration, how many optimizer steps the run has. Options under `megatron:`
that are fields of OptimizerConfig or DistributedDataParallelConfig are passed on unrenamed. Knows
nothing of losses or samples.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import torch

from spmd_rl.config.schema import Config


def wrap(chunks: list[torch.nn.Module], config: Any, megatron: dict[str, Any]) -> list[Any]:
    """The chunks in Megatron's DistributedDataParallel; tells `config` how to finish gradients."""
    from megatron.core.distributed import (
        DistributedDataParallel,
        DistributedDataParallelConfig,
        finalize_model_grads,
    )

    defaults = dict(
        use_distributed_optimizer=True,
        grad_reduce_in_fp32=True,
        check_for_nan_in_grad=True,
        overlap_grad_reduce=False,
    )
    options = DistributedDataParallelConfig(
        **_fields(DistributedDataParallelConfig, megatron, defaults)
    )
    wrapped = [
        DistributedDataParallel(config, options, chunk, disable_bucketing=i > 0)
        for i, chunk in enumerate(chunks)
    ]

    def finish_gradients(model, num_tokens=None, **kwargs):
        finalize_model_grads(model, None, **kwargs)  # the loss is scaled already: do not divide

    config.finalize_model_grads_func = finish_gradients
    if options.overlap_grad_reduce:
        functions = [chunk.no_sync for chunk in wrapped]
        config.no_sync_func = functions[0] if len(functions) == 1 else functions
    return wrapped


def build(wrapped: list[Any], config: Any, cfg: Config) -> Any:
    """Megatron's optimizer over the wrapped chunks, its Adam state allocated."""
    from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer

    defaults = dict(
        optimizer="adam",
        lr=cfg.train.lr,
        min_lr=0.0,
        clip_grad=cfg.train.clip_grad,
        weight_decay=0.01,
        bf16=config.bf16,
        params_dtype=config.params_dtype,
        use_distributed_optimizer=wrapped[0].ddp_config.use_distributed_optimizer,
        overlap_param_gather=wrapped[0].ddp_config.overlap_param_gather,
    )
    fixed = {k: v for k, v in cfg.megatron.items() if k != "bf16"}
    options = OptimizerConfig(**_fields(OptimizerConfig, fixed, defaults))
    optimizer = get_megatron_optimizer(
        options, wrapped, use_gloo_process_groups=torch.cuda.is_available()
    )
    config.grad_scale_func = optimizer.scale_loss if config.fp16 else None
    for inner in torch_adams(optimizer):
        _speed_up(inner)
        _allocate_state(inner)
    return optimizer


def before_steps(wrapped: list[Any]) -> None:
    """With `megatron.overlap_param_gather`: parameters may arrive while layers already compute."""
    for chunk in wrapped:
        if chunk.ddp_config.overlap_param_gather and not chunk.remove_forward_pre_hook_handles:
            chunk.enable_forward_pre_hook()


def after_steps(wrapped: list[Any]) -> None:
    """With `megatron.overlap_param_gather` ranks hold old parameters until they are asked for."""
    for chunk in wrapped:
        if chunk.ddp_config.overlap_param_gather and chunk.remove_forward_pre_hook_handles:
            chunk.disable_forward_pre_hook(param_sync=True)


def build_schedule(optimizer: Any, cfg: Config, num_steps: int) -> Any:
    """Learning rate over optimizer steps: warm-up, then `lr_decay_style` over `lr_decay_iters`."""
    from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler

    train, megatron = cfg.train, cfg.megatron
    decay = train.lr_decay_iters or max(num_steps, 1)
    warmup = train.lr_warmup_iters
    if train.lr_warmup_fraction is not None:
        warmup = int(train.lr_warmup_fraction * decay)
    if warmup >= decay:
        if train.lr_decay_iters is not None and train.lr_decay_style != "constant":
            raise ValueError(
                f"train.lr_warmup_iters is {warmup}, but the schedule has only {decay} steps; "
                "lower it or raise train.lr_decay_iters"
            )
        decay = warmup + 1  # a run cut short ends within its warm-up
    weight_decay = megatron.get("weight_decay", 0.01)
    return OptimizerParamScheduler(
        optimizer,
        init_lr=train.lr_warmup_init,
        max_lr=train.lr,
        min_lr=megatron.get("min_lr", 0.0),
        lr_warmup_steps=warmup,
        lr_decay_steps=decay,
        lr_decay_style=train.lr_decay_style,
        start_wd=weight_decay,
        end_wd=weight_decay,
        wd_incr_steps=decay,
        wd_incr_style="constant",
        wsd_decay_steps=megatron.get("lr_wsd_decay_iters", max(decay // 10, 1)),
        lr_wsd_decay_style=megatron.get("lr_wsd_decay_style", "exponential"),
        use_checkpoint_opt_param_scheduler=False,
        override_opt_param_scheduler=True,  # a resumed run follows the configuration it is given
    )


def _fields(cls: type, given: dict[str, Any], defaults: dict[str, Any]) -> dict[str, Any]:
    names = {f.name for f in dataclasses.fields(cls)}
    return {k: v for k, v in (defaults | given).items() if k in names}


def torch_adams(optimizer: Any) -> list[torch.optim.Optimizer]:
    """The torch Adams inside; none where Transformer Engine or Apex has replaced them."""
    chained = getattr(optimizer, "chained_optimizers", [optimizer])
    inner = [getattr(o, "optimizer", None) for o in chained]
    return [o for o in inner if isinstance(o, (torch.optim.Adam, torch.optim.AdamW))]


def _speed_up(adam: torch.optim.Optimizer) -> None:
    """One fused pass over each parameter instead of about ten."""
    for group in adam.param_groups:
        group["fused"], group["foreach"] = True, False


def _allocate_state(adam: torch.optim.Optimizer) -> None:
    """Adam's state before the first step: a checkpoint is read into it."""
    for group in adam.param_groups:
        for parameter in group["params"]:
            if not adam.state[parameter]:
                adam.state[parameter].update(
                    step=torch.zeros((), dtype=torch.float32, device=parameter.device),
                    exp_avg=torch.zeros_like(parameter),
                    exp_avg_sq=torch.zeros_like(parameter),
                )
