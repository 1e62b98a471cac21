"""The other processes of a run, and what it looks like when one of them is gone."""

from __future__ import annotations

import torch.distributed

from msil.errors import RunError


class PeerLost(RunError):
    """Another process of the run has ended, so this one cannot go on."""


def lost_peer(error: BaseException) -> bool:
    """Whether an error is what gloo or NCCL say when another process is gone."""
    return isinstance(error, torch.distributed.DistError) or (
        isinstance(error, RuntimeError) and ("gloo/transport" in str(error) or "NCCL" in str(error))
    )
