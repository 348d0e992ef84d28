"""Fine-tunes a model with LoRA, using transformers' Trainer, PEFT and torch_fused, on Python's own docstrings.

    python examples/04_finetune_lora.py                  # SmolLM2-135M-Instruct, the demo's model
    python examples/04_finetune_lora.py --steps 400      # resumes from the last checkpoint
    python examples/04_finetune_lora.py --stock          # the same without torch_fused

Prints the loss on held-out text before and after, and plots the losses.
"""

import argparse
import random
from pathlib import Path

import torch
from helpers import advice_if_out_of_memory, docstrings, save_plot
from peft import LoraConfig, get_peft_model
from transformers import Qwen2Config, Qwen2ForCausalLM, Trainer, TrainingArguments
from transformers.trainer_utils import get_last_checkpoint

from torch_fused.demo import load_demo_model
from torch_fused.hf import apply_torch_fused
from torch_fused.optim import AdamW


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=200, help="total, including those of an earlier run")
    parser.add_argument("--batch-size", type=int, default=2)
    parser.add_argument("--accumulate", type=int, default=2, help="batches per step")
    parser.add_argument("--length", type=int, default=128, help="tokens per sequence")
    parser.add_argument("--learning-rate", type=float, default=3e-4)
    parser.add_argument("--checkpoint", action="store_true", help="recompute the layers in backward: less memory")
    parser.add_argument("--save-every", type=int, default=50, help="steps between checkpoints")
    parser.add_argument("--output", type=Path, default=Path("finetuned"), help="for checkpoints and the plot")
    parser.add_argument("--stock", action="store_true", help="without torch_fused")
    parser.add_argument("--tiny", action="store_true", help="random weights, bytes as tokens: a quick test run")
    return parser.parse_args()


def load(tiny: bool):
    """(model, function from text to tokens)"""
    if not tiny:
        model, tokenizer = load_demo_model(torch.bfloat16 if torch.cuda.is_available() else torch.float32)
        return model, lambda text: tokenizer(text, add_special_tokens=False)["input_ids"] + [tokenizer.eos_token_id]
    shape = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2}
    torch.manual_seed(0)
    return Qwen2ForCausalLM(Qwen2Config(vocab_size=256, **shape, **heads)), lambda text: list(text.encode())


def packed(encode, length: int) -> tuple[list[dict], list[dict]]:
    """Training and held-out sequences: the texts concatenated and cut into equal lengths."""
    texts = docstrings()
    random.Random(0).shuffle(texts)
    parts = []
    for some in (texts[50:], texts[:50]):
        ids = [token for text in some for token in encode(text)]
        rows = [ids[i : i + length] for i in range(0, len(ids) - length + 1, length)]
        parts.append([{"input_ids": row, "labels": row} for row in rows])
    return parts[0], parts[1][:32]


def main() -> None:
    args = arguments()
    model, encode = load(args.tiny)
    train, held_out = packed(encode, args.length)
    torch.manual_seed(0)
    model = get_peft_model(model, LoraConfig(r=8, lora_alpha=16, target_modules="all-linear", task_type="CAUSAL_LM"))
    if not args.stock:
        apply_torch_fused(model)
    kind = torch.optim.AdamW if args.stock else AdamW
    settings = TrainingArguments(
        output_dir=str(args.output),
        max_steps=args.steps,
        per_device_train_batch_size=args.batch_size,
        per_device_eval_batch_size=args.batch_size,
        gradient_accumulation_steps=args.accumulate,
        gradient_checkpointing=args.checkpoint,
        lr_scheduler_type="constant_with_warmup",
        warmup_steps=5,
        logging_steps=1,
        save_steps=args.save_every,
        save_total_limit=2,
        report_to="none",
        disable_tqdm=False,
    )
    trainer = Trainer(
        model,
        settings,
        train_dataset=train,
        eval_dataset=held_out,
        optimizer_cls_and_kwargs=(kind, {"lr": args.learning_rate, "weight_decay": 0.0}),
    )
    last = get_last_checkpoint(args.output) if args.output.is_dir() else None
    print(
        f"{len(train)} sequences of {args.length} tokens; "
        + (f"resuming from {last}" if last else "starting at step 0")
    )
    with advice_if_out_of_memory("try --checkpoint, a smaller --batch-size with more --accumulate, a shorter --length"):
        before = trainer.evaluate()["eval_loss"]
        trainer.train(resume_from_checkpoint=last)
        after = trainer.evaluate()["eval_loss"]
    logs = trainer.state.log_history
    trained = [(entry["step"], entry["loss"]) for entry in logs if "loss" in entry]
    plot = args.output / "losses.png"
    if trained:
        save_plot(plot, {"training": trained, "held out": [(trained[0][0], before), (trained[-1][0], after)]})
    print(f"held-out loss before {before:.4f} after {after:.4f}; plot: {plot}")


if __name__ == "__main__":
    main()
