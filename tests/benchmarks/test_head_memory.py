"""Memory of a head that is read in parts: that of one part, whatever labels the gradient is of."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest

pytestmark = pytest.mark.skipif(not os.access("/proc/self/clear_refs", os.W_OK), reason="the system counts no peaks")
PARTS, TOKENS, WIDTH = 48, 4096, 1024
PROGRAM = """
import json, sys
from contextlib import contextmanager
from pathlib import Path
import torch
from torch import nn
from svdconvert.models.head import Head
from svdconvert.models.loss import next_token_loss
parts, tokens, width = json.loads(sys.argv[1])
torch.set_num_threads(1)
generator = torch.Generator().manual_seed(0)

@contextmanager
def part(number):
    linear = nn.Linear(0, 0, bias=False)
    linear.weight = nn.Parameter(torch.full((tokens, width), 0.01), requires_grad=False)
    yield nn.Sequential(linear, nn.Identity())

def now(field):
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(field))

head = Head(nn.Identity(), [slice(tokens * n, tokens * (n + 1)) for n in range(parts)], 256, part)
ids = torch.randint(0, parts * tokens, (1, 257), generator=generator)
hidden, mask = torch.randn(1, 257, width, generator=generator), torch.ones_like(ids, dtype=torch.bool)
drawn = torch.rand(1, 257, generator=generator, dtype=torch.float64)
for draws in None, None, drawn:  # the first one loads what a process keeps
    Path("/proc/self/clear_refs").write_text("5")  # the peak begins here
    before = now("VmRSS")
    next_token_loss(head, hidden, ids, mask, check=lambda logits: None, draws=draws, gradient=True)
    print(now("VmHWM") - before)
"""


def test_drawn_labels_take_no_part_more() -> None:
    """What stays behind one part after the other would keep their memory from being used again, half of the head's."""
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, json.dumps([PARTS, TOKENS, WIDTH])], capture_output=True, text=True, check=True
    )
    _, own, drawn = map(int, done.stdout.split())
    assert drawn < own + PARTS // 4 * TOKENS * WIDTH * 4
