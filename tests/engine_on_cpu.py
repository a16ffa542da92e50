"""A training script under FSDP on the CPU, for fork_server.py; accelerate offers it on accelerators alone.

Everything but the name of the kind of machine is real: sharding, gloo, saving and loading. `calls-RANK.json` in the
output folder tells how often each process called a UNet in each optimiser step.
"""

import json
import os
from pathlib import Path

from accelerate import Accelerator, PartialState
from accelerate.utils import DistributedType

import train_smpo_sd15
import train_smpo_sdxl


SCRIPTS = {"sd15": train_smpo_sd15, "sdxl": train_smpo_sdxl}


def parse_args(args):
    return SCRIPTS[args[0]], SCRIPTS[args[0]].parse_args(args[1:])


def main(script_and_args):
    script, args = script_and_args
    PartialState(cpu=True)
    PartialState._shared_state["distributed_type"] = DistributedType.MULTI_XPU
    calls, call_unet, clip_grad_norm = [0], script.call_unet, Accelerator.clip_grad_norm_

    def counted(*inputs):
        calls[-1] += 1
        return call_unet(*inputs)

    def end_of_step(*inputs):
        calls.append(0)
        return clip_grad_norm(*inputs)

    script.call_unet, Accelerator.clip_grad_norm_ = counted, end_of_step
    script.main(args)
    Path(args.output_dir, f"calls-{os.environ['RANK']}.json").write_text(json.dumps(calls))
