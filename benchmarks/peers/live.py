"""Peak of live tensor bytes of one initialisation: what torch.cuda.max_memory_allocated would tell, told on a CPU.

    live.py ours MODEL DATA OUTPUT        live.py peft MODEL DATA OUTPUT

Every operation's tensors are watched by their storages; the last line printed is the peak in bytes. Of ours, finished
factors do not count, since they are moved to host memory, and block inputs are in a temporary file.
"""

import runpy
import sys
from functools import partial
from pathlib import Path

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

WHICH = sys.argv.pop(1)


class Live:
    """The bytes of all storages that are alive, at their peak."""

    def __init__(self):
        self.peak = 0
        self._alive = {}  # weak reference to a storage → its bytes
        self._bound = 0  # of their sum; too large until what is gone is forgotten

    def see(self, tensors):
        for tensor in tensors:
            if isinstance(tensor, torch.Tensor) and tensor.device.type == "cpu":
                storage = tensor.untyped_storage()
                weak = storage._weak_ref()
                if self._alive.get(weak) != storage.nbytes():
                    self._bound += storage.nbytes() - self._alive.get(weak, 0)
                    self._alive[weak] = storage.nbytes()
        if self._bound > self.peak:
            found = {weak: torch.UntypedStorage._new_with_weak_ptr(weak) for weak in self._alive}
            self._alive = {weak: storage.nbytes() for weak, storage in found.items() if storage is not None}
            self._bound = sum(self._alive.values())
            self.peak = max(self.peak, self._bound)


class Watch(TorchDispatchMode):
    """Shows every operation of this thread to `live`."""

    def __init__(self, live):
        super().__init__()
        self._live = live

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        self._live.see(tree_leaves((args, kwargs, result)))
        return result


def run_ours(live):
    from rows import parse_arguments

    from loraone_init import DataOptions, load_sample, open_model
    from loraone_init.gradients.causal_lm import CausalLM
    from loraone_init.gradients.stream import stream_gradients
    from loraone_init.layers.targets import select_targets
    from loraone_init.linalg import spectral_init, truncated_svd
    from loraone_init.linalg.seeding import layer_generator
    from loraone_init.streaming import driver
    from loraone_init.streaming.coroutines import Coroutine
    from loraone_init.streaming.keeping import keeping
    from loraone_init.streaming.stack import BlockStack

    def watched(function):  # each micro-batch has a thread of its own
        with Watch(live):
            return function()

    driver.Coroutine = lambda function: Coroutine(partial(watched, function))
    arguments = parse_arguments()
    opened = open_model(arguments.model, placement="disk")
    options = DataOptions(samples=10**6, max_length=arguments.max_length)
    batches = load_sample(str(arguments.data), opened.tokenizer, options).batches
    targets = select_targets(opened.module, "all-linear")
    stack = BlockStack.of(opened)
    with keeping(device_bytes=0) as keeper, stack.kept_by(keeper), Watch(live):
        _, gradients = stream_gradients(stack, targets, CausalLM(opened.module, opened.device), batches)
        while (gradient := next(gradients, None)) is not None:
            generator = layer_generator(0, gradient.name)
            svd = truncated_svd(gradient.G, arguments.rank, generator=generator)
            spectral_init(svd.U, svd.S, svd.Vh, 128.0, generator, rank=svd.rank)
            del gradient, svd


def run_peft(live):
    with Watch(live):
        runpy.run_path(str(Path(__file__).parent / "peft_lora_ga.py"))


watching = Live()
{"ours": run_ours, "peft": run_peft}[WHICH](watching)
print(watching.peak)
