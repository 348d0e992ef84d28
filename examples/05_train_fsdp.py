"""Trains a Qwen2 model from random weights with FSDP2 on several processes, on Python's own docstrings.

    torchrun --nproc-per-node 2 examples/05_train_fsdp.py                                    # two CPUs: gloo
    torchrun --nproc-per-node gpu examples/05_train_fsdp.py --hidden 896 --layers 24         # every GPU here: NCCL
    python examples/05_train_fsdp.py                                                         # one process

Each process holds its shard of the weights, gradients and averages. The step clips the gradient norm over all shards. A
second run resumes from the checkpoint of the first, with any number of processes.
"""

import argparse
import os
import random
import shutil
import time
from pathlib import Path

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from helpers import advice_if_out_of_memory, docstrings, save_plot
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from tqdm import tqdm
from transformers import Qwen2Config, Qwen2ForCausalLM

from torch_fused.hf import apply_torch_fused
from torch_fused.optim import AdamW

BYTES = 256  # a token is a byte


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=200, help="total, including those of an earlier run")
    parser.add_argument("--batch-size", type=int, default=8, help="sequences per step, over all processes")
    parser.add_argument("--length", type=int, default=256, help="bytes per sequence")
    parser.add_argument("--hidden", type=int, default=256, help="a multiple of 64")
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--learning-rate", type=float, default=1e-3)
    parser.add_argument("--checkpoint", action="store_true", help="recompute the layers in backward: less memory")
    parser.add_argument("--save-every", type=int, default=50, help="steps between checkpoints")
    parser.add_argument("--output", type=Path, default=Path("trained"), help="for checkpoints and the plot")
    return parser.parse_args()


def start() -> tuple[torch.device, int, int]:
    """(device, rank, number of processes) from torchrun's environment, or for one process."""
    if "RANK" not in os.environ:
        os.environ |= {"RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"}
    device = torch.device("cpu")
    if torch.cuda.is_available():
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
        torch.cuda.set_device(device)
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    return device, dist.get_rank(), dist.get_world_size()


def sharded_model(args: argparse.Namespace, device: torch.device, processes: int) -> torch.nn.Module:
    torch.manual_seed(0)  # the same weights for any number of processes
    config = Qwen2Config(
        vocab_size=BYTES,
        hidden_size=args.hidden,
        intermediate_size=4 * args.hidden,
        num_hidden_layers=args.layers,
        num_attention_heads=args.hidden // 64,
        num_key_value_heads=args.hidden // 64,
        max_position_embeddings=args.length,
        use_cache=False,
    )
    model = Qwen2ForCausalLM(config).to(device).train()
    apply_torch_fused(model)
    if args.checkpoint:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    mesh = init_device_mesh(device.type, (processes,))
    half = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    options = {"mesh": mesh, "mp_policy": half} if device.type == "cuda" else {"mesh": mesh}
    for layer in model.model.layers:
        fully_shard(layer, **options)
    fully_shard(model, **options)
    return model


class Progress:
    """What a checkpoint holds besides weights and averages."""

    def __init__(self) -> None:
        self.losses: list[float] = []

    def state_dict(self) -> dict:
        return {"losses": self.losses}

    def load_state_dict(self, state: dict) -> None:
        self.losses = list(state["losses"])


class Training:
    """The model and its optimizer, for a checkpoint."""

    def __init__(self, model: torch.nn.Module, optimizer: torch.optim.Optimizer) -> None:
        self.model, self.optimizer = model, optimizer

    def state_dict(self) -> dict:
        weights, averages = get_state_dict(self.model, self.optimizer)
        return {"weights": weights, "averages": averages}

    def load_state_dict(self, state: dict) -> None:
        set_state_dict(
            self.model, self.optimizer, model_state_dict=state["weights"], optim_state_dict=state["averages"]
        )


def checkpoints(output: Path) -> list[Path]:
    """The complete checkpoints, which have this file; the latest is last."""
    return sorted(path.parent for path in output.glob("step-*/.metadata"))


def batch(text: torch.Tensor, step: int, args: argparse.Namespace, rank: int, processes: int) -> torch.Tensor:
    """This process's part of a step's sequences, which depend only on the step."""
    starts = torch.randint(len(text) - args.length, (args.batch_size,), generator=torch.Generator().manual_seed(step))
    return torch.stack([text[start : start + args.length] for start in starts[rank::processes].tolist()])


def main() -> None:
    args = arguments()
    device, rank, processes = start()
    if args.batch_size % processes:
        raise SystemExit(f"--batch-size {args.batch_size} must be a multiple of the {processes} processes")
    texts = docstrings()
    random.Random(0).shuffle(texts)
    text = torch.tensor(list("\n\n".join(texts).encode()), dtype=torch.long)
    with advice_if_out_of_memory("try --checkpoint, a smaller --batch-size or --length, or more processes"):
        train(args, text, device, rank, processes)
    dist.destroy_process_group()


def train(args: argparse.Namespace, text: torch.Tensor, device: torch.device, rank: int, processes: int) -> None:
    model = sharded_model(args, device, processes)
    optimizer = AdamW(model.parameters(), lr=args.learning_rate, weight_decay=0.1, max_grad_norm=1.0)
    progress = Progress()
    parts = {"training": Training(model, optimizer), "progress": progress}
    if whole := checkpoints(args.output):
        dcp.load(parts, checkpoint_id=whole[-1])
    first = len(progress.losses)
    losses: list[torch.Tensor] = []  # on the device; reading a value would wait for it
    bar = tqdm(range(first, args.steps), initial=first, total=args.steps, disable=rank > 0, unit="step")
    began = time.perf_counter()
    for step in bar:
        ids = batch(text, step, args, rank, processes).to(device)
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.detach())
        last = step + 1 == args.steps
        if last or (step + 1) % 10 == 0:
            seconds = time.perf_counter() - began
            tokens = args.batch_size * args.length * (step + 1 - first)
            bar.set_postfix(loss=f"{loss.item():.3f}", tokens_per_second=f"{tokens / seconds:.0f}")
        if last or (step + 1) % args.save_every == 0:
            mean = torch.stack(losses)
            dist.all_reduce(mean)
            progress.losses += (mean / processes).tolist()
            losses = []
            dcp.save(parts, checkpoint_id=args.output / f"step-{step + 1:08}")
            for older in checkpoints(args.output)[:-1] if rank == 0 else []:
                shutil.rmtree(older)
    if rank == 0:
        plot = args.output / "losses.png"
        save_plot(plot, {"training": list(enumerate(progress.losses, 1))})
        print(f"{processes} processes, steps {first} to {args.steps}: loss {progress.losses[-1]:.4f}; plot: {plot}")


if __name__ == "__main__":
    main()
