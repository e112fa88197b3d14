"""The keys of `algo:`: estimators, losses, corrections. The rest of the schema is in schema.py."""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, ConfigDict, Field


class Section(BaseModel):
    model_config = ConfigDict(extra="forbid", protected_namespaces=())


class AlgoConfig(Section):
    # reinforcement learning, supervised fine-tuning, or a function of yours
    loss_type: Literal["policy_loss", "sft_loss", "custom_loss"] = "policy_loss"
    custom_loss_function_path: str | None = None  # the function of loss_type custom_loss
    # how rewards become advantages
    advantage_estimator: Literal[
        "grpo",
        "gspo",
        "cispo",
        "rloo",
        "reinforce_plus_plus",
        "reinforce_plus_plus_baseline",
        "ppo",
    ] = "grpo"
    # function in place of the estimator's advantages; the loss stays the estimator's
    custom_advantage_function_path: str | None = None
    disable_rewards_normalization: bool = False  # use rewards as they are
    disable_grpo_std_normalization: bool = False  # subtract the group's mean only
    normalize_advantages: bool = False  # whiten advantages over the whole rollout
    gamma: float = Field(default=1.0, ge=0, le=1)  # discount of reinforce_plus_plus and ppo
    # of ppo: how much later values count in an advantage (GAE)
    lambd: float = Field(default=1.0, ge=0, le=1)
    # of ppo: how far a step's values count away from those before it
    value_clip: float = Field(default=0.2, ge=0)
    # of ppo: first rollouts that train the critic alone
    num_critic_only_steps: int = Field(default=0, ge=0)
    # ratios are clipped to 1 - eps_clip ... 1 + eps_clip_high
    eps_clip: float = Field(default=0.2, ge=0)
    eps_clip_high: float | None = Field(default=None, ge=0)  # None: eps_clip
    eps_clip_c: float | None = Field(default=None, gt=1)  # dual clip
    # leave out samples of negative advantage that the policy has moved away from
    use_opsm: bool = False
    opsm_delta: float = 1e-4  # the mean log-ratio from which it has
    use_kl_loss: bool = False  # hold the policy near the reference model by a loss term
    kl_loss_coef: float = 0.0  # weight of that term
    kl_loss_type: Literal["k1", "k2", "k3", "low_var_kl"] = "k1"  # its estimator
    kl_coef: float = 0.0  # weight of the KL penalty in rewards (ppo, reinforce_plus_plus*)
    use_unbiased_kl: bool = False  # weigh the KL estimate by the importance ratio
    # rollouts after which the reference becomes the policy as it is then; None: never
    ref_update_interval: int | None = Field(default=None, ge=1)
    entropy_coef: float = 0.0  # weight of the entropy bonus
    # mean over all tokens; else over each sample's, then samples
    calculate_per_token_loss: bool = False
    # function in place of that mean, for the policy term
    custom_pg_loss_reducer_function_path: str | None = None
    use_rollout_logprobs: bool = False  # take the engine's log-probs as the old ones
    # take those of the weights that were pushed to the engines, kept in host memory
    keep_old_actor: bool = False
    # on-policy distillation: learn from a teacher's log-probs of the policy's own tokens
    use_opd: bool = False
    # the teacher is an SGLang server, or a model in the trainer
    opd_type: Literal["sglang", "megatron"] | None = None
    opd_kl_coef: float = 1.0  # weight of log p_policy - log p_teacher, taken from advantages
    # HF directory of the teacher, of the policy's vocabulary, or with megatron a torch_dist one of
    # the policy's shape; with sglang the job serves it, None: reward.rm_url is the address of one
    opd_teacher_load: str | None = None
    # which checkpoint of a torch_dist opd_teacher_load; None: the newest
    opd_teacher_ckpt_step: int | None = Field(default=None, ge=0)
    # experts that the log-prob pass chose serve the updates too (R2; mixtures of experts)
    use_routing_replay: bool = False
    # experts that the engine chose serve the log-prob pass and the updates (R3)
    use_rollout_routing_replay: bool = False
    # correct for engine and trainer differing, by importance weights
    use_tis: bool = False
    tis_clip: float = 2.0  # upper limit of that weight
    tis_clip_low: float = 0.0  # lower limit of that weight
    # ratio of a token, its product over a sample's tokens, or its geometric mean
    tis_level: Literal["token", "sequence", "geometric"] = "token"
    # beyond the limits: cut above, cut on both sides, or drop the token (IcePop, MIS)
    tis_mode: Literal["truncate", "clip", "mask"] = "clip"
    # in place of tis_clip; the lower limit is then 1 / it
    tis_upper_bound: float | None = Field(default=None, gt=0)
    tis_lower_bound: float | None = Field(default=None, ge=0)  # in place of tis_clip_low
    tis_batch_normalize: bool = False  # divide weights by their mean over the rollout
    custom_tis_function_path: str | None = None  # function in place of all this
    use_rs: bool = False  # drop tokens whose ratio is beyond limits (rejection sampling)
    rs_level: Literal["token", "sequence", "geometric"] = "token"  # as tis_level
    rs_upper_bound: float | None = Field(default=None, gt=0)  # None: that of the weights
    rs_lower_bound: float | None = Field(default=None, ge=0)  # None: tis_lower_bound, or 1 / upper
    # a sample with a token of a smaller ratio is dropped whole
    rs_veto_threshold: float | None = Field(default=None, gt=0)
    # drop samples by their largest k2, or mean k3, divergence
    rs_trust_region: Literal["max", "avg"] | None = None
    rs_tr_threshold: float | None = Field(default=None, gt=0)  # the divergence allowed there
    get_mismatch_metrics: bool = False  # report importance weights without using them
