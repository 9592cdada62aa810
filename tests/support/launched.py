"""The training command as `accelerate launch -m support.launched` starts it: CPU processes, killed where DIE_AT says.

torch shards over gloo as it does over NCCL, but accelerate leaves CPU processes out of FSDP. Where its configuration
asks for FSDP, it is told here that they are GPUs whose device is the CPU; all else is the real path.
"""

from __future__ import annotations

import os
from pathlib import Path

if os.environ.get("ACCELERATE_USE_FSDP") == "true":
    os.environ["ACCELERATE_TORCH_DEVICE"] = "cpu"

    import torch
    from accelerate.state import DistributedType, PartialState

    torch.distributed.init_process_group("gloo")
    PartialState._prepare_backend = lambda self, *args, **kwargs: ("gloo", DistributedType.MULTI_GPU)

from examples.dialogue.train import main
from support.training_runs import die_at

if step := int(os.environ["DIE_AT"]):
    die_at(step, Path("/"))
main(prog_name="launched")
