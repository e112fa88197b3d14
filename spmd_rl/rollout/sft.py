"""Batches for supervised fine-tuning, straight from the data: no engine answers anything.

Comes in: samples whose prompt is text or chat messages; goes out: samples with tokens and a mask
of what is trained on: the label, or every assistant turn, with the end token.
"""

from __future__ import annotations

from spmd_rl.data.masks import MultiTurnLossMaskGenerator, get_response_lengths
from spmd_rl.data.rows import DataError
from spmd_rl.data.template import Template, as_messages
from spmd_rl.types import Sample, Status


class Encoder:
    """Fills in the tokens and the mask of a sample."""

    def __init__(self, template: Template, loss_mask_type: str = "qwen"):
        self.template, self.loss_mask_type = template, loss_mask_type
        self._masks: MultiTurnLossMaskGenerator | None = None

    def encode(self, sample: Sample) -> Sample:
        if isinstance(sample.prompt, str) and not self.template.apply:
            self._plain(sample, sample.prompt)
        else:
            self._chat(sample)
        sample.status = Status.COMPLETED
        sample.reward = 0.0
        return sample

    def _plain(self, sample: Sample, prompt: str) -> None:
        if sample.label is None:
            raise DataError(
                "loss_type: sft_loss learns the label that follows a prompt: set data.label_key, "
                "or give chat messages under data.input_key"
            )
        before = self.template.encode(prompt)
        after = self.template.encode(str(sample.label))
        end = self.template.tokenizer.eos_token_id
        after += [] if end is None else [end]
        sample.tokens, sample.response_length = before + after, len(after)
        sample.loss_mask = [1] * len(after)

    def _chat(self, sample: Sample) -> None:
        messages = list(as_messages(sample.prompt))
        if sample.label is not None:
            messages.append({"role": "assistant", "content": str(sample.label)})
        if self._masks is None:
            self._masks = MultiTurnLossMaskGenerator(
                self.template.tokenizer, self.loss_mask_type, self.template.kwargs
            )
        sample.tokens, mask = self._masks.get_loss_mask(messages, sample.metadata.get("tools"))
        (sample.response_length,) = get_response_lengths([mask])
        if not sample.response_length:
            raise DataError(
                f"row {sample.index} has no assistant turn to learn from: give one in "
                "data.input_key's messages, or set data.label_key"
            )
        sample.loss_mask = mask[-sample.response_length :]
