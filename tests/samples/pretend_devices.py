"""Several devices where there is one: tensors that claim to be elsewhere, and refuse to meet as CUDA's would.

Every number is real, since all of it happens on the CPU; only ``tensor.device``, ``tensor.to`` and the rule that an
operation's tensors share a device are played. What C++ does among itself is not seen.
"""

import accelerate.hooks
import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves

CPU = torch.device("cpu")
_PLACE = "_pretended_device"


def place_of(tensor):
    """Where a tensor claims to be; None for one that came from nowhere that is watched."""
    return getattr(tensor, _PLACE, None)


class PretendDevices(TorchFunctionMode):
    """Within, tensors have the devices that they were put on."""

    def __torch_function__(self, function, types, arguments=(), keywords=None):
        keywords = dict(keywords or {})
        if function == Tensor.device.__get__:
            return place_of(arguments[0]) or CPU
        if function is Tensor.pin_memory:
            return arguments[0]
        if function is Tensor.to:
            return self._moved(*arguments, **keywords)
        if function is Tensor.cpu:
            return self._marked(arguments[0].view_as(arguments[0]), CPU)
        if keywords.get("device") is not None:
            place = torch.device(keywords.pop("device"))
            return self._marked(function(*arguments, **keywords), place)
        tensors = [leaf for leaf in tree_leaves((arguments, keywords)) if isinstance(leaf, Tensor)]
        return self._marked(function(*arguments, **keywords), self._common(function, tensors))

    def _common(self, function, tensors):
        """The one device of these tensors; numbers, and indices on the CPU, may be used anywhere."""
        if not tensors:
            return CPU
        if function in (Tensor.__getitem__, Tensor.__setitem__):
            tensors = [tensors[0], *(tensor for tensor in tensors[1:] if place_of(tensor) != CPU)]
        large = {place_of(tensor) for tensor in tensors if tensor.ndim} - {None}
        if len(large) > 1:
            raise RuntimeError(f"{function.__name__}: tensors meet on {sorted(map(str, large))}")
        known = [place_of(tensor) for tensor in tensors if place_of(tensor) is not None]
        return next(iter(large), known[0] if known else None)

    def _moved(self, tensor, *arguments, **keywords):
        place, rest = place_of(tensor), []
        for argument in (*arguments, keywords.pop("device", None)):
            if isinstance(argument, Tensor):
                place = place_of(argument)
                rest.append(argument.dtype)
            elif isinstance(argument, torch.dtype):
                rest.append(argument)
            elif argument is not None and not isinstance(argument, bool):
                place = torch.device(argument)
        keywords.pop("non_blocking", None)
        moved = tensor.to(*rest, **keywords)
        return moved if place == place_of(moved) else self._marked(moved.view_as(moved), place)

    @staticmethod
    def _marked(result, place):
        for leaf in tree_leaves(result):
            if isinstance(leaf, Tensor) and place is not None:
                setattr(leaf, _PLACE, place)
        return result


def spread(model, places, monkeypatch):
    """Put a model's modules on pretended devices by name, with the hooks that accelerate would put on them."""
    for name, place in places.items():
        module = model.get_submodule(name)
        for tensor in (*module.parameters(), *module.buffers()):
            setattr(tensor, _PLACE, torch.device(place))
    # accelerate would move the weights for real.
    monkeypatch.setattr(accelerate.hooks, "set_module_tensor_to_device", lambda *_, **__: None)
    inputs = next(place for name, place in places.items() if "embed" in name)
    devices = {name: torch.device(place) for name, place in {**places, "": inputs}.items()}
    accelerate.hooks.attach_align_device_hook_on_blocks(
        model,
        execution_device=devices,
        offload=dict.fromkeys(places, False),
        skip_keys=model._skip_keys_device_placement,
    )
    return model
