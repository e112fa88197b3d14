"""TRL's side of bench_step.py: GRPOTrainer on the same model, prompts and response lengths.

Runs in TRL's own environment and imports nothing of this repository. In: a JSON file with the work;
out: a JSON line with the seconds of each step and the tokens it trained on.
"""

from __future__ import annotations

import json
import os
import sys
import time

os.environ.update(HF_HUB_OFFLINE="1", TOKENIZERS_PARALLELISM="false", WANDB_DISABLED="true")


def main() -> None:
    with open(sys.argv[1]) as file:
        work = json.load(file)
    os.environ["OMP_NUM_THREADS"] = str(work["threads"])
    import torch

    torch.set_num_threads(work["threads"])
    import trl
    from datasets import Dataset
    from transformers import AutoModelForCausalLM, AutoTokenizer, LogitsProcessorList

    tokenizer = AutoTokenizer.from_pretrained(work["model"])
    model = AutoModelForCausalLM.from_pretrained(work["model"], dtype=torch.float32)
    model.generation_config.eos_token_id = tokenizer.eos_token_id
    forced = LogitsProcessorList([_forced_lengths(work["lengths"], tokenizer.eos_token_id)])
    generate = model.generate

    def generate_with_lengths(*args, **kwargs):
        forced[0].start = None
        return generate(*args, logits_processor=forced, **kwargs)

    model.generate = generate_with_lengths
    samples, tokens = len(work["lengths"]), []

    def reward(completions, completion_ids, **_):
        tokens.append(sum(len(ids) for ids in completion_ids))
        return [len(set(text)) / max(len(text), 1) for text in completions]

    arguments = trl.GRPOConfig(
        output_dir=work["output"],
        per_device_train_batch_size=work["rows"],
        gradient_accumulation_steps=samples // work["rows"],
        num_generations=work["group"],
        max_completion_length=max(work["lengths"]),
        max_steps=work["steps"],
        learning_rate=1e-5,
        temperature=1.0,
        beta=0.0,
        bf16=False,
        use_cpu=True,
        gradient_checkpointing=False,
        save_strategy="no",
        report_to=[],
        logging_steps=1000,
        disable_tqdm=True,
    )
    trainer = trl.GRPOTrainer(
        model=model,
        reward_funcs=reward,
        args=arguments,
        train_dataset=Dataset.from_list([{"prompt": text} for text in work["prompts"]]),
        processing_class=tokenizer,
    )
    generating = _time_generation(trainer)
    stamps = _step_stamps(trainer)
    trainer.train()
    seconds = [b - a for a, b in zip(stamps, stamps[1:], strict=False)]  # the first is a warm-up
    answer = {
        "version": trl.__version__,
        "seconds": seconds,
        "generate": generating[1:],
        "tokens": tokens[1:],
    }
    print("\n" + json.dumps(answer))


def _forced_lengths(lengths: list[int], eos: int):
    """End row i after lengths[i] tokens, the end token being the last, and not before."""
    import torch
    from transformers import LogitsProcessor

    class ForcedLengths(LogitsProcessor):
        def __init__(self):
            self.last = torch.tensor(lengths) - 1
            self.start: int | None = None  # length of the (padded) prompts

        def __call__(self, input_ids, scores):
            if self.start is None:
                self.start = input_ids.shape[1]
            scores[:, eos] = -torch.inf
            ends = self.last[: len(scores)] == input_ids.shape[1] - self.start
            if bool(ends.any()):
                scores[ends] = -torch.inf
                scores[ends, eos] = 0.0
            return scores

    return ForcedLengths()


def _time_generation(trainer) -> list[float]:
    """Seconds of each call that generates and scores a step's completions."""
    seconds: list[float] = []
    original = trainer._generate_and_score_completions

    def timed(*args, **kwargs):
        began = time.perf_counter()
        result = original(*args, **kwargs)
        seconds.append(time.perf_counter() - began)
        return result

    trainer._generate_and_score_completions = timed
    return seconds


def _step_stamps(trainer) -> list[float]:
    from transformers import TrainerCallback

    stamps: list[float] = []

    class Stamp(TrainerCallback):
        def on_step_end(self, *args, **kwargs):
            stamps.append(time.perf_counter())

    trainer.add_callback(Stamp())
    return stamps


if __name__ == "__main__":
    main()
