"""Checks between keys: each returns sentences, none stops at the first.

Comes in: a `Config` whose single keys have the right types; goes out: faults. What needs files is
in files.py, what needs the number of ranks in layout.py.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterator

from spmd_rl.config import critic, debug, deterministic, distillation, evaluation
from spmd_rl.config.errors import Fault
from spmd_rl.config.schema import Config

RM_TYPES = (
    *("math", "deepscaler", "dapo", "f1", "gpqa", "ifbench", "format", "code"),
    *("random", "remote_rm"),
)
GROUP_ESTIMATORS = ("grpo", "gspo", "cispo", "rloo", "reinforce_plus_plus_baseline")


def check(cfg: Config) -> Iterator[Fault]:
    yield from _budget(cfg)
    yield from _length(cfg)
    yield from _batching(cfg)
    yield from _rollout(cfg)
    yield from evaluation.check(cfg)
    yield from _names(cfg)
    yield from deterministic.check(cfg)
    yield from critic.check(cfg)
    yield from debug.check(cfg)
    yield from distillation.check(cfg)
    if cfg.algo.loss_type != "sft_loss":
        yield from _reward(cfg)
        yield from _policy(cfg)
        yield from _correction(cfg)
    yield from _functions(cfg)
    yield from _optimizer(cfg)


def check_steps(cfg: Config, dp: int) -> Iterator[Fault]:
    """Whether a step's samples can be dealt to `dp` data-parallel ranks."""
    size, micro = cfg.train.global_batch_size or 0, cfg.train.micro_batch_size
    keys = (
        "train.global_batch_size",
        "rollout.num_steps_per_rollout",
        "rollout.rollout_batch_size",
    )
    if cfg.train.use_dynamic_batch_size:
        if size < dp:
            yield Fault(
                keys,
                f"train.global_batch_size {size} leaves some of the {dp} data-parallel ranks "
                f"without a sample: make it at least {dp}",
            )
    elif size % (dp * micro):
        yield Fault(
            (keys[0], "train.micro_batch_size", *keys[1:]),
            f"train.global_batch_size {size} is not a multiple of {dp} data-parallel ranks x "
            f"train.micro_batch_size {micro}: change one, or set "
            "train.use_dynamic_batch_size: true",
        )


def _budget(cfg: Config) -> Iterator[Fault]:
    rollout, train = cfg.rollout, cfg.train
    produced = rollout.rollout_batch_size * rollout.n_samples_per_prompt
    consumed = (train.global_batch_size or 0) * (rollout.num_steps_per_rollout or 0)
    if produced != consumed:
        yield Fault(
            (
                "train.global_batch_size",
                "rollout.num_steps_per_rollout",
                "rollout.rollout_batch_size",
                "rollout.n_samples_per_prompt",
            ),
            f"rollout.rollout_batch_size {rollout.rollout_batch_size} x n_samples_per_prompt "
            f"{rollout.n_samples_per_prompt} = {produced} samples are produced, but "
            f"train.global_batch_size {train.global_batch_size} x num_steps_per_rollout "
            f"{rollout.num_steps_per_rollout} = {consumed} are used: make them equal, or leave "
            "out one of the last two",
        )


def _length(cfg: Config) -> Iterator[Fault]:
    rollout = cfg.rollout
    if rollout.num_rollout is None and rollout.num_epoch is None:
        yield Fault(
            ("rollout.num_rollout", "rollout.num_epoch"),
            "rollout.num_rollout and rollout.num_epoch are both missing: give one, the run has "
            "no end",
        )
    if rollout.num_rollout == 0 and not evaluation.evaluates(cfg):
        yield Fault(
            ("rollout.num_rollout", "eval.eval_interval", "eval.eval_prompt_data"),
            "rollout.num_rollout 0 only evaluates: give eval.eval_interval and "
            "eval.eval_prompt_data, or at least one rollout",
        )


def _batching(cfg: Config) -> Iterator[Fault]:
    train = cfg.train
    if train.use_dynamic_batch_size and train.max_tokens_per_gpu is None:
        yield Fault(
            ("train.max_tokens_per_gpu", "train.use_dynamic_batch_size"),
            "train.use_dynamic_batch_size needs train.max_tokens_per_gpu: give the tokens of a "
            "micro-batch",
        )
    if train.log_probs_chunk_size == 0 or train.log_probs_chunk_size < -1:
        yield Fault(
            ("train.log_probs_chunk_size",),
            f"train.log_probs_chunk_size must be at least 1, or -1 for 256 MiB of them, not "
            f"{train.log_probs_chunk_size}: change it",
        )


def _rollout(cfg: Config) -> Iterator[Fault]:
    rollout = cfg.rollout
    over = rollout.over_sampling_batch_size
    if over is not None and over < rollout.rollout_batch_size:
        yield Fault(
            ("rollout.over_sampling_batch_size", "rollout.rollout_batch_size"),
            f"rollout.over_sampling_batch_size {over} is less than rollout.rollout_batch_size "
            f"{rollout.rollout_batch_size}: raise it or leave it out",
        )
    for key in ("mask_offpolicy_in_partial_rollout", "buffer_filter_path"):
        if getattr(rollout, key) and not rollout.partial_rollout:
            yield Fault(
                (f"rollout.{key}", "rollout.partial_rollout"),
                f"rollout.{key} has no effect without rollout.partial_rollout: true: set it, or "
                f"leave rollout.{key} out",
            )
    context, prompt = rollout.rollout_max_context_len, cfg.data.rollout_max_prompt_len
    if context is not None and prompt is not None and prompt >= context:
        yield Fault(
            ("data.rollout_max_prompt_len", "rollout.rollout_max_context_len"),
            f"data.rollout_max_prompt_len {prompt} leaves no room for a response in "
            f"rollout.rollout_max_context_len {context}: make it at most {context - 1}",
        )
    if rollout.rollout_top_k != -1 and rollout.rollout_top_k < 1:
        yield Fault(
            ("rollout.rollout_top_k",),
            f"rollout.rollout_top_k must be at least 1, or -1 for no limit, not "
            f"{rollout.rollout_top_k}: change it",
        )


def _names(cfg: Config) -> Iterator[Fault]:
    name = cfg.logging.name
    if name is not None and (name in ("", ".", "..") or "/" in name):
        yield Fault(
            ("logging.name",),
            f"logging.name {name!r} is no plain name, and would lead out of logging.run_dir: use "
            "letters, digits, '-', '_' and '.'; put folders into logging.run_dir",
        )


def _reward(cfg: Config) -> Iterator[Fault]:
    reward = cfg.reward
    kind = (reward.rm_type or RM_TYPES[0]).removeprefix("boxed_")
    if kind not in RM_TYPES:
        near = difflib.get_close_matches(kind, RM_TYPES, n=1)
        fix = f"did you mean {near[0]}?" if near else "change it, or give reward.custom_rm_path"
        yield Fault(
            ("reward.rm_type",),
            f"reward.rm_type must be one of {', '.join(RM_TYPES)}, not {reward.rm_type}: {fix}",
        )
    if kind == "remote_rm" and not getattr(reward, "rm_url", None):
        yield Fault(
            ("reward.rm_url", "reward.rm_type"),
            "reward.rm_type remote_rm needs reward.rm_url: give the address that judges",
        )
    if reward.group_rm and reward.custom_rm_path is None:
        yield Fault(
            ("reward.group_rm", "reward.custom_rm_path"),
            "reward.group_rm needs reward.custom_rm_path: give a function of a list of samples, or "
            "leave it out",
        )


def _policy(cfg: Config) -> Iterator[Fault]:
    algo, n = cfg.algo, cfg.rollout.n_samples_per_prompt
    estimator = algo.advantage_estimator
    if estimator.startswith("reinforce_plus_plus") and not algo.normalize_advantages:
        yield Fault(
            ("algo.normalize_advantages", "algo.advantage_estimator"),
            f"algo.advantage_estimator {estimator} needs algo.normalize_advantages: true",
        )
    compared = not (algo.disable_rewards_normalization or algo.use_opd)
    if n == 1 and estimator in GROUP_ESTIMATORS and compared:
        yield Fault(
            ("rollout.n_samples_per_prompt", "algo.advantage_estimator"),
            f"rollout.n_samples_per_prompt 1: algo.advantage_estimator {estimator} compares the "
            "samples of a prompt and would learn nothing: use at least 2, or set "
            "algo.disable_rewards_normalization: true",
        )
    if algo.kl_coef and algo.kl_loss_coef:
        yield Fault(
            ("algo.kl_coef", "algo.kl_loss_coef"),
            f"algo.kl_coef {algo.kl_coef} and algo.kl_loss_coef {algo.kl_loss_coef} exclude each "
            "other: set one to 0",
        )
    if algo.ref_update_interval and not (algo.use_kl_loss or algo.kl_coef):
        yield Fault(
            ("algo.ref_update_interval", "algo.use_kl_loss"),
            "algo.ref_update_interval has no effect without a reference model: set "
            "algo.use_kl_loss: true, or algo.kl_coef",
        )
    if algo.keep_old_actor and algo.use_rollout_logprobs:
        yield Fault(
            ("algo.keep_old_actor", "algo.use_rollout_logprobs"),
            "algo.keep_old_actor and algo.use_rollout_logprobs both say what the old log-probs "
            "are: set one to false",
        )
    if algo.kl_loss_coef and not algo.use_kl_loss:
        yield Fault(
            ("algo.kl_loss_coef", "algo.use_kl_loss"),
            f"algo.kl_loss_coef {algo.kl_loss_coef} has no effect: set algo.use_kl_loss: true",
        )


def _correction(cfg: Config) -> Iterator[Fault]:
    algo = cfg.algo
    if algo.use_tis and algo.use_rollout_logprobs:
        yield Fault(
            ("algo.use_tis", "algo.use_rollout_logprobs"),
            "algo.use_tis and algo.use_rollout_logprobs exclude each other: set one to false",
        )
    if algo.tis_clip_low > algo.tis_clip:
        yield Fault(
            ("algo.tis_clip_low", "algo.tis_clip"),
            f"algo.tis_clip_low {algo.tis_clip_low} is above algo.tis_clip {algo.tis_clip}: "
            "lower it",
        )
    for low, high in (("tis_lower_bound", "tis_upper_bound"), ("rs_lower_bound", "rs_upper_bound")):
        least, most = getattr(algo, low), getattr(algo, high)
        if least is not None and most is not None and least > most:
            yield Fault(
                (f"algo.{low}", f"algo.{high}"),
                f"algo.{low} {least} is above algo.{high} {most}: lower it",
            )
    if algo.rs_trust_region and algo.rs_tr_threshold is None:
        yield Fault(
            ("algo.rs_tr_threshold", "algo.rs_trust_region"),
            f"algo.rs_trust_region {algo.rs_trust_region} needs algo.rs_tr_threshold: give the "
            "divergence allowed",
        )
    for key in ("rs_veto_threshold", "rs_trust_region"):
        if getattr(algo, key) is not None and not algo.use_rs:
            yield Fault(
                (f"algo.{key}", "algo.use_rs"),
                f"algo.{key} has no effect: set algo.use_rs: true",
            )
    if algo.custom_tis_function_path and not (algo.use_tis or algo.get_mismatch_metrics):
        yield Fault(
            ("algo.custom_tis_function_path", "algo.use_tis"),
            "algo.custom_tis_function_path has no effect: set algo.use_tis: true (or "
            "algo.get_mismatch_metrics: true, which only reports)",
        )


OF_RL = (  # functions that look at generated samples
    "rollout_sample_filter_path",
    "rollout_all_samples_process_path",
    "custom_convert_samples_to_train_data_path",
    "custom_rollout_log_function_path",
)


def _functions(cfg: Config) -> Iterator[Fault]:
    algo, train = cfg.algo, cfg.train
    if algo.loss_type == "sft_loss" and not cfg.rollout.rollout_function_path:
        for key in OF_RL:
            if getattr(cfg.rollout, key):
                yield Fault(
                    (f"rollout.{key}", "algo.loss_type"),
                    f"rollout.{key} has no effect with algo.loss_type sft_loss, which generates "
                    "nothing: leave it out, or give a rollout.rollout_function_path",
                )
    if (algo.loss_type == "custom_loss") != (algo.custom_loss_function_path is not None):
        yield Fault(
            ("algo.custom_loss_function_path", "algo.loss_type"),
            "algo.loss_type custom_loss and algo.custom_loss_function_path belong together: give "
            "both or neither",
        )
    if train.only_train_params_name_list and train.freeze_params_name_list:
        yield Fault(
            ("train.only_train_params_name_list", "train.freeze_params_name_list"),
            "train.only_train_params_name_list and train.freeze_params_name_list exclude each "
            "other: keep one",
        )
    for key in ("only_train_params_name_list", "freeze_params_name_list"):
        for pattern in getattr(train, key) or []:
            try:
                re.compile(pattern)
            except re.error as error:
                yield Fault(
                    (f"train.{key}",),
                    f"train.{key}: '{pattern}' is no regular expression ({error}): correct it",
                )


def _optimizer(cfg: Config) -> Iterator[Fault]:
    train = cfg.train
    if train.lr_warmup_iters and train.lr_warmup_fraction is not None:
        yield Fault(
            ("train.lr_warmup_fraction", "train.lr_warmup_iters"),
            "train.lr_warmup_iters and train.lr_warmup_fraction exclude each other: keep one",
        )
    if cfg.megatron.get("fp16") and cfg.megatron.get("bf16"):
        yield Fault(
            ("megatron.fp16", "megatron.bf16"),
            "megatron.fp16 and megatron.bf16 exclude each other: keep one",
        )
    if cfg.megatron.get("sequence_parallel") and (
        cfg.megatron.get("tensor_model_parallel_size", 1) == 1
    ):
        yield Fault(
            ("megatron.sequence_parallel", "megatron.tensor_model_parallel_size"),
            "megatron.sequence_parallel needs megatron.tensor_model_parallel_size above 1: "
            "leave it out",
        )
