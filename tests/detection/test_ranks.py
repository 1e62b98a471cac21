"""Losses in several processes: the mean of the ranks' losses is the loss of all their images, for every head."""

from __future__ import annotations

from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor

from msil.detection import Target
from msil.detection.losses import mean_across_ranks

from .cases import map_sizes_of, random_pyramid, target
from .reference import FORMS, build

# The boxes of either rank, and of a run in which one of them has none.
COUNTS = ((9, 2), (9, 0))
SIZES = [(64, 96), (50, 80)]


def targets_of(counts: tuple[int, int]) -> list[Target]:
    """Boxes of about the size that an untrained head predicts, so that no normalizer falls below its floor."""
    generator = torch.Generator().manual_seed(0)
    targets = []
    for count in counts:
        corner = torch.rand(count, 2, generator=generator) * 30
        size = 20 + 20 * torch.rand(count, 2, generator=generator)
        labels = torch.randint(5, (count,), generator=generator)
        targets.append(target(torch.cat([corner, corner + size], 1), labels))
    return targets


def losses_and_gradients(images: slice) -> Iterator[tuple[str, dict[str, Tensor]]]:
    pyramid = [level[images] for level in random_pyramid(2, map_sizes=map_sizes_of(64, 96))]
    for name, epoch in FORMS:
        head = build(name, epoch=epoch)
        for counts in COUNTS:
            head.zero_grad()
            losses = head.loss(head(pyramid), targets_of(counts)[images], SIZES[images])
            torch.stack(list(losses.values())).sum().backward()
            gradients = {key: parameter.grad for key, parameter in head.named_parameters()}
            assert None not in gradients.values()
            found = {**losses, **gradients}
            yield f"{name} {epoch} {counts}", {key: value.detach().clone() for key, value in found.items()}


def run_rank(rank: int, folder: str) -> None:
    """As rank 0 in the test's process and as rank 1 in another one."""
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=2, timeout=timedelta(minutes=2)
    )
    try:
        values = torch.tensor([1.0, 8.0, 0.5]) if rank == 0 else torch.tensor([4.0, 0.0, 0.0])
        kept = values.clone()
        means = {"mean": mean_across_ranks(values), "at least": mean_across_ranks(values, [6.0, 1.0, 1.0])}
        assert torch.equal(values, kept)
        torch.save({"means": means, **dict(losses_and_gradients(slice(rank, rank + 1)))}, f"{folder}/{rank}.pt")
    finally:
        dist.destroy_process_group()


def test_two_processes_average_to_the_loss_of_the_whole_batch(tmp_path: Path) -> None:
    """One image with many positives and one with few: only normalizers averaged over both ranks give this."""
    other = mp.get_context("spawn").Process(target=run_rank, args=(1, str(tmp_path)), daemon=True)
    other.start()
    run_rank(0, str(tmp_path))
    other.join(60)
    assert other.exitcode == 0
    first, second = (torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in range(2))
    for rank in (first, second):
        assert rank["means"]["mean"].tolist() == [2.5, 4, 0.25]
        # totals 5, 8 and 0.5 raised to 6, 1 and 1
        assert rank["means"]["at least"].tolist() == [3, 4, 0.5]
    for case, whole in losses_and_gradients(slice(0, 2)):
        for name, expected in whole.items():
            mean = (first[case][name] + second[case][name]) / 2
            allowed = 1e-4 * expected.abs() + 1e-5 * expected.abs().max()
            assert ((mean - expected).abs() <= allowed).all(), (case, name)
