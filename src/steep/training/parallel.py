"""Training in several processes: each has the whole model and a share of every step's rows, and DDP averages gradients.

A step trains what one process with as many rows a step would. What is computed from it is the same everywhere, because
gradients and losses are, so every process decides alike what is applied.
"""

from __future__ import annotations

from dataclasses import fields
from typing import Any

import torch
import torch.distributed as dist
import transformers
from accelerate import DistributedDataParallelKwargs
from accelerate.data_loader import prepare_data_loader
from torch import nn
from torch.utils.data import DataLoader

from steep import ranks
from steep.errors import RunError, UserError
from steep.model.checksum import checksum
from steep.model.fp8_linear import Fp8Linear
from steep.model.unwrap import unwrap


def settle_arguments(args: Any) -> None:
    """Set how DDP and the loss work, where the caller leaves it open.

    Raises:
        UserError: losses that are not averaged over the targets of all processes; processes that would train apart.
    """
    if ranks.world_size() == 1:
        return
    if args.world_size != ranks.world_size():
        raise UserError(
            "use_cpu",
            f"torchrun started {ranks.world_size()} processes, and transformers would train each by itself: it found "
            "no GPU, and joins processes on a CPU only when asked to",
            "Give use_cpu=True.",
        )
    if args.ddp_find_unused_parameters is None:
        args.ddp_find_unused_parameters = False  # every trained tensor has a gradient in every step: the proof says so
    if not args.average_tokens_across_devices:
        raise UserError(
            "training.average_tokens_across_devices",
            "without it each process would average over its own targets, and a filled-up batch has none",
            "Leave it out.",
        )


def settle_trainer(trainer: transformers.Trainer) -> None:
    """The same for what the trainer has made of them.

    Raises:
        UserError: the model cannot average its loss over the targets of a step, of all its forwards and processes.
        RunError: the processes hold other frozen weights in e4m3.
    """
    model: Any = trainer.model
    several = ranks.world_size() > 1
    by_forward = trainer.args.gradient_accumulation_steps > 1 and trainer.compute_loss_func is None
    if not trainer.model_accepts_loss_kwargs and (several or by_forward):
        raise UserError(
            "model.name",
            f"{type(unwrap(model)).__name__} takes no num_items_in_batch, so each "
            f"{'process' if several else 'forward of a step'} would average over its own targets",
            "Train it in one process, with gradient_accumulation_steps: 1.",
        )
    if not several:
        return
    leave_out_e4m3(model)
    accelerator: Any = trainer.accelerator
    given = accelerator.ddp_handler
    settings = {field.name: getattr(given, field.name) for field in fields(given)}
    # A view of its bucket: else each gradient exists twice.
    accelerator.ddp_handler = _InOrder(**{**settings, "gradient_as_bucket_view": True})


def leave_out_e4m3(model: nn.Module) -> None:
    """Keep frozen weights in e4m3 out of what DDP sends to all processes at its start, which no backend can with such
    numbers; in its place their checksums are compared. Their scales go with them.

    Raises:
        RunError: the processes hold other ones.
    """
    frozen = {
        f"{name}.{part}": tensor
        for name, module in model.named_modules()
        if isinstance(module, Fp8Linear)
        for part, tensor in (("weight", module.weight.data), ("scale", module.scale))
    }
    if not frozen:
        return
    found = "\n".join(f"{name} {checksum(tensor)}" for name, tensor in frozen.items()).encode()
    if len(set(ranks.gathered_bytes(found))) > 1:
        raise RunError("the processes hold other frozen weights. Give all of them the same files and cards")
    given = getattr(model, "_ddp_params_and_buffers_to_ignore", ())
    model._ddp_params_and_buffers_to_ignore = [*given, *frozen]  # pyright: ignore[reportArgumentType]


class _InOrder(DistributedDataParallelKwargs):
    """DDP whose sums have the same bits in a run that goes on as in one that was never stopped.

    The sum of three numbers depends on their order, and that on a tensor's place in DDP's buckets, which changes after
    the first step of a process. So with more than two processes each tensor is summed by itself.
    """

    def register_comm_hook(self, model: Any) -> None:
        if ranks.world_size() > 2:
            model.register_comm_hook(None, _average_each_tensor)


def loader(trainer: transformers.Trainer, sampler: Any) -> Any:
    """The train data loader over this process's own rows. accelerate would divide them itself, and repeat real ones in
    the last batches."""
    args = trainer.args
    inner = DataLoader(
        trainer.train_dataset,  # pyright: ignore[reportArgumentType]
        batch_size=args.per_device_train_batch_size,
        sampler=sampler,
        collate_fn=trainer.data_collator,
        num_workers=args.dataloader_num_workers,
        pin_memory=args.dataloader_pin_memory,
        persistent_workers=args.dataloader_persistent_workers,
        prefetch_factor=args.dataloader_prefetch_factor,
        multiprocessing_context=args.dataloader_multiprocessing_context,
    )
    return prepare_data_loader(inner, args.device, num_processes=1, process_index=0, put_on_device=True)


def draw_apart(seed: int) -> None:
    """At the first step of a run, let each process draw its own dropout; from then on its random state is kept."""
    if not ranks.is_main():
        transformers.set_seed((seed + ranks.rank()) % 2**32)  # numpy takes none above


def _average_each_tensor(_, bucket):  # without annotations: DDP refuses those that are text, as all are in this file
    sums: list[Any] = [dist.all_reduce(each.div_(ranks.world_size()), async_op=True) for each in bucket.gradients()]
    for one in sums:
        one.wait()  # of a GPU the stream waits, not this thread
    buffer = bucket.buffer()
    done = torch.futures.Future(devices=[buffer.device] if buffer.is_cuda else [])
    done.set_result(buffer)
    return done
