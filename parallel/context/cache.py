"""What is worked out once and kept for the next layer or micro-batch that asks for it."""

from collections import OrderedDict
from collections.abc import Callable, Hashable
from types import MethodType
from typing import Any, cast

from torch import Tensor


def sound(key: Any) -> Hashable:
    """A key that is equal where what it stands for is.

    A tensor counts by its numbers, a bound method by what it is bound to: `a.f` and `b.f` are the same where a == b, in every layer of a
    model. Raises ValueError for a tensor on a device, whose numbers the host would have to wait for, and TypeError for what has no hash.
    """
    if isinstance(key, Tensor):
        if key.device.type != "cpu":
            raise ValueError(f"a tensor on {key.device} is no key: keep it on the CPU")
        return Tensor, key.dtype, tuple(key.shape), key.detach().numpy().tobytes()
    if isinstance(key, MethodType):
        return MethodType, key.__func__, sound(key.__self__)
    if type(key) is tuple:
        return tuple(map(sound, key))
    hash(key)
    return cast(Hashable, key)


class Cache[Value]:
    """The last `size` values that were asked for; None: all."""

    def __init__(self, size: int | None = None):
        self.size = size
        self._values: OrderedDict[Hashable, Value] = OrderedDict()

    def __len__(self) -> int:
        return len(self._values)

    def get(self, key: Any, make: Callable[[], Value]) -> Value:
        """The value of a key (see `sound`), made now if it is not there. Nothing is kept where `make` raises."""
        known = sound(key)
        if known in self._values:
            self._values.move_to_end(known)
            return self._values[known]
        value = make()
        self._values[known] = value
        if self.size is not None and len(self._values) > self.size:
            self._values.popitem(last=False)
        return value
