"""Runs a training script under FSDP or DeepSpeed on the CPU; accelerate offers them on accelerators alone.

    python -m torch.distributed.run --nproc_per_node 2 tests/engine_on_cpu.py train_smpo_sd15 FLAGS

Everything but the name of the kind of machine is real: sharding, gloo, saving and loading. DeepSpeed asks whether autocast is on
without saying where, which means CUDA; here it is answered for the CPU, as it would be answered there.
"""

import importlib
import sys
from pathlib import Path

import torch
from accelerate import PartialState
from accelerate.utils import DistributedType


sys.path.insert(0, str(Path(__file__).parent.parent))
PartialState(cpu=True)
PartialState._shared_state["distributed_type"] = DistributedType.MULTI_XPU
is_autocast_enabled = torch.is_autocast_enabled
torch.is_autocast_enabled = lambda device_type="cpu": is_autocast_enabled(device_type)
script = importlib.import_module(sys.argv[1])
script.main(script.parse_args(sys.argv[2:]))
