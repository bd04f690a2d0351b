"""One rank of a run that only connects to the watchdog and then does what its argument says.

RANK=1 WORLD_SIZE=2 MASTER_ADDR=127.0.0.1 MASTER_PORT=12345 python tests/training/helpers/watchdog_rank.py \
    {return,wait,raise,all_reduce}

HANG_TIMEOUT_S: as run.hang_timeout_s, 0 without it.
"""

import logging
import os
import sys
import time
from datetime import timedelta

import torch
import torch.distributed

from megabert.training.distributed import flight_recorder
from megabert.training.distributed.heartbeat import progress
from megabert.training.distributed.watchdog import PeerWatchdog

logging.basicConfig(format="%(message)s")
rank, world_size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
flight_recorder.switch_on()
torch.distributed.init_process_group("gloo", timeout=timedelta(minutes=10))
hang_timeout_s = float(os.environ.get("HANG_TIMEOUT_S", "0"))
with PeerWatchdog(rank, world_size, hang_timeout_s=hang_timeout_s):
    progress.step_done(12)
    progress.enter("data")
    # Two beats.
    time.sleep(hang_timeout_s / 2)
    sys.stdout.write("connected\n")
    sys.stdout.flush()
    match sys.argv[1]:
        case "wait":
            time.sleep(120)
        case "raise":
            raise ValueError(f"rank {rank} has a bad shard")
        case "all_reduce":
            progress.enter("agree")
            torch.distributed.all_reduce(torch.zeros(1))
