"""Training on a sequence that is longer than one device holds: each process has one part of it.

    torchrun --nproc-per-node 4 examples/context_parallel.py
    torchrun --nproc-per-node 4 examples/context_parallel.py --attention ulysses --length 512

On GPUs (NCCL) where there are any, else on the CPU (gloo). Only attention looks past the part that
a process has. All else is done position by position, so that the model is as ever, and DDP brings
the gradients together. The loss does not depend on the number of processes.
"""

import argparse
import os

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

import fusedformer
from fusedformer.integrations.parallel import ring_attention, shard_sequence, ulysses_attention


class Model(nn.Module):
    """A pre-norm Transformer layer between embeddings and a classifier of the next token."""

    def __init__(self, args: argparse.Namespace, width: int = 64, heads: int = 4) -> None:
        super().__init__()
        self.heads, self.zigzag, self.dropout = heads, args.attention == "ring", args.dropout
        self.tokens = nn.Embedding(args.vocabulary, width)
        self.positions = nn.Embedding(args.length, width)
        for embedding in (self.tokens, self.positions):
            nn.init.normal_(embedding.weight, std=0.1)
        self.norm1, self.norm2 = fusedformer.nn.LayerNorm(width), fusedformer.nn.LayerNorm(width)
        self.qkv = nn.Linear(width, 3 * width)
        self.out = nn.Linear(width, width)
        self.feed_forward = nn.Sequential(
            nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width)
        )

    def forward(self, tokens: Tensor, positions: Tensor, targets: Tensor) -> Tensor:
        """The mean loss of this process's part; all are (B, N / size)."""
        x = self.tokens(tokens) + self.positions(positions)
        x = x + self.attend(self.norm1(x))
        x = x + self.feed_forward(self.norm2(x))
        return fusedformer.linear_cross_entropy(x, self.tokens.weight, targets)

    def attend(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        options = {"causal": True, "dropout_p": self.dropout if self.training else 0.0}
        if self.zigzag:
            y = ring_attention(q, k, v, zigzag=True, **options)
        else:
            y = ulysses_attention(q, k, v, **options)
        return self.out(y.transpose(1, 2).flatten(2))


def train(args: argparse.Namespace, device: torch.device) -> None:
    torch.manual_seed(0)  # so that all make the same sequence and draw alike
    model = Model(args).to(device)
    parallel = DistributedDataParallel(model)
    optimizer = torch.optim.AdamW(model.parameters(), 3e-3)
    # Every token stands twice in a row: half of them can be told from the one before.
    sequence = torch.randint(args.vocabulary, (1, args.length // 2 + 1)).repeat_interleave(2, 1)
    whole = (sequence[:, :-2], torch.arange(args.length)[None], sequence[:, 1:-1])
    own = [shard_sequence(x, zigzag=model.zigzag).to(device) for x in whole]
    for step in range(args.steps):
        loss = parallel(*own)
        loss.backward()  # DDP takes the mean over processes, of means over parts of one length
        optimizer.step()
        optimizer.zero_grad()
        mean = loss.detach() / dist.get_world_size()
        dist.all_reduce(mean)
        if dist.get_rank() == 0:
            print(f"step {step}  loss {mean:.5f}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--attention", choices=("ring", "ulysses"), default="ring")
    parser.add_argument("--length", type=int, default=1024, help="tokens of the whole sequence")
    parser.add_argument("--vocabulary", type=int, default=64)
    parser.add_argument("--dropout", type=float, default=0.1, help="of attention's probabilities")
    parser.add_argument("--steps", type=int, default=10)
    args = parser.parse_args()

    device = torch.device("cpu")
    if torch.cuda.is_available():
        device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        torch.cuda.set_device(device)
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    train(args, device)
    # All that holds the group, DDP above all, is gone by now; else gloo may never let go of it.
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
