"""Functions a user might write for the trainer, with slime's signatures."""

import torch


def advantage(args, rollout_data):
    """GRPO's own, but halved; slime's function changes the dictionary and returns nothing."""
    assert {"log_probs", "kl", "loss_masks", "rollout_log_probs"} <= set(rollout_data)
    assert len(rollout_data["unconcat_tokens"]) == len(rollout_data["rewards"])
    rollout_data["advantages"] = [
        torch.full_like(mask, reward / 2)
        for mask, reward in zip(rollout_data["loss_masks"], rollout_data["rewards"], strict=True)
    ]
    rollout_data["returns"] = rollout_data["advantages"]


def no_advantage(args, rollout_data):
    pass


def short_advantage(args, rollout_data):
    rollout_data["advantages"] = [torch.zeros(1) for _ in rollout_data["rewards"]]


def plain_gradient(args, batch, logits, sum_of_sample_mean):
    """The policy gradient on the first step's terms, from log-probs that are at hand."""
    assert logits.requires_grad and logits.dim() == 2
    assert len(batch["log_probs"]) == len(batch["total_lengths"]) == len(batch["loss_masks"])
    log_probs = torch.cat(batch["current_log_probs"])
    loss = sum_of_sample_mean(-log_probs * torch.cat(batch["advantages"]))
    return loss, {"loss_again": loss.clone().detach(), "entropy": sum_of_sample_mean(
        torch.cat(batch["entropy"]))}  # fmt: skip


def scalar_loss(args, batch, logits, sum_of_sample_mean):
    return 0.0


def mean_reducer(total_lengths, response_lengths, loss_masks, calculate_per_token_loss):
    """What happens without a function, in slime's four arguments."""
    assert not calculate_per_token_loss

    def reduce(values):
        parts = values.split(response_lengths)
        return sum(
            (mask * part).sum() / mask.sum().clamp_min(1)
            for mask, part in zip(loss_masks, parts, strict=True)
        )

    return reduce


def halving_tis(args, *, pg_loss, train_log_probs, rollout_log_probs, loss_masks, **kwargs):
    """Half of every loss, and the second half of every response rejected."""
    assert len(kwargs["response_lengths"]) == len(kwargs["total_lengths"]) == len(loss_masks)
    masks = [torch.where(torch.arange(len(m)) < len(m) // 2, m, 0) for m in loss_masks]
    gap = torch.cat(train_log_probs) - torch.cat(rollout_log_probs)
    return 0.5 * pg_loss, masks, {"my_gap": gap}


def wrong_tis(args, *, pg_loss, **kwargs):
    return pg_loss


def postprocess(args, rollout_id, rollout_data):
    """slime's: lists of one tensor a sample, changed in the dictionary."""
    assert rollout_id == 0 and {"log_probs", "returns"} <= set(rollout_data)
    rollout_data["advantages"] = [2 * part for part in rollout_data["advantages"]]
    for mask in rollout_data["loss_masks"]:
        mask[1::2] = 0


def wrong_postprocess(args, rollout_id, rollout_data):
    rollout_data["advantages"] = [torch.zeros(1) for _ in rollout_data["rewards"]]
