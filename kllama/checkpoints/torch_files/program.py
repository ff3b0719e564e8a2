"""The pickle inside an archive of `torch.save`: tensors by name, and where each lies in its storage.

A pickle is a program. This is a machine of its own for the few instructions that describe tensors: it makes dicts,
lists, tuples, numbers and texts, and knows five names that a program may call, none of which runs any code. Every other
instruction and every other name is refused. `archive.py` calls it; no file is read here.
"""

import pickletools
from collections.abc import Callable
from typing import NamedTuple

from kllama.checkpoints.files.reader import shown
from kllama.errors import CheckpointError, UnsupportedError

STATE_LIMIT = 2**16  # objects that wait on the stack at once; torch.save needs 2000

# The types that a storage may have. All but the first three are there to be named in a message.
_STORAGES = {
    "torch FloatStorage": "F32",
    "torch HalfStorage": "F16",
    "torch BFloat16Storage": "BF16",
    "torch DoubleStorage": "F64",
    "torch ByteStorage": "U8",
    "torch CharStorage": "I8",
    "torch ShortStorage": "I16",
    "torch IntStorage": "I32",
    "torch LongStorage": "I64",
    "torch BoolStorage": "BOOL",
    "torch ComplexFloatStorage": "C64",
}
ITEM_SIZES = {
    "BOOL": 1,
    "U8": 1,
    "I8": 1,
    "F16": 2,
    "BF16": 2,
    "I16": 2,
    "F32": 4,
    "I32": 4,
    "F64": 8,
    "I64": 8,
    "C64": 8,
}
"""Bytes of a number of each type that a storage may have."""

_TENSOR, _PARAMETER = "torch._utils _rebuild_tensor_v2", "torch._utils _rebuild_parameter"
_DICT = "collections OrderedDict"
_NAMES = {*_STORAGES, _TENSOR, _PARAMETER, _DICT}


class Storage(NamedTuple):
    """A run of numbers of one type: the member `data/<key>` of the archive."""

    key: str
    dtype: str
    num_items: int


class PickledTensor(NamedTuple):
    """A tensor as the pickle describes it; nothing here has been compared with the storage yet."""

    storage: Storage
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]


class _Name(NamedTuple):
    """Something that a program may call or name."""

    name: str


def read_tensors(program: bytes, source: str) -> dict[str, PickledTensor]:
    """Return the tensors that a pickle describes, by name.

    Args:
        program: the bytes of `data.pkl`; the caller bounds how many.
        source: the file, for messages.

    Raises:
        UnsupportedError: sparse or quantised tensors, tensors of other classes, or a dict of tensors inside another.
        CheckpointError: any other name, instruction or object, or a damaged pickle.
    """
    content = _Machine(source).run(program)
    if type(content) is not dict:
        raise CheckpointError(f"{source}: top level = {_kind(content)}; expected a dict of tensors by name.")
    for name, value in content.items():
        if type(value) is dict:
            raise UnsupportedError(
                f"{source}: {shown(name)} = a dict; expected a tensor. The file holds more than a model: save the dict "
                "of its tensors alone."
            )
        if type(name) is not str or type(value) is not PickledTensor:
            raise CheckpointError(f"{source}: {shown(name)} = {_kind(value)}; expected a tensor.")
    return content


def _kind(value: object) -> str:
    return "None" if value is None else f"a {type(value).__name__.removeprefix('_').lower()}"


class _Machine:
    """Runs one program. What is between two marks is a list of its own, so no instruction reaches below its mark."""

    def __init__(self, source: str):
        self._source = source
        self._stack: list = []
        self._below: list[list] = []
        self._memo: dict[int, object] = {}
        self._height = 0

    def run(self, program: bytes) -> object:
        try:
            for instruction, argument, at in pickletools.genops(program):
                if instruction.name == "STOP":
                    if at != len(program) - 1:
                        raise self._refusal(f"{len(program) - 1 - at} bytes behind the end", "none")
                    return self._pop()
                if instruction.name not in _INSTRUCTIONS:
                    raise self._refusal(f"instruction {instruction.name}", "one of those that describe tensors")
                _INSTRUCTIONS[instruction.name](self, argument)
        except ValueError as error:
            if isinstance(error, CheckpointError):
                raise
            raise self._refusal("data.pkl", f"a complete pickle ({error})") from error
        raise self._refusal("data.pkl without its end", "a complete pickle")

    def _refusal(self, received: str, expected: str) -> CheckpointError:
        return CheckpointError(f"{self._source}: {received}; expected {expected}. Nothing of it was run.")

    def _check_protocol(self, number: int) -> None:
        if not 2 <= number <= 5:
            raise self._refusal(f"pickle protocol {number}", "2 to 5")

    def _push(self, value: object) -> None:
        self._height += 1
        if self._height > STATE_LIMIT:
            raise self._refusal(f"more than {STATE_LIMIT} objects at once", "fewer")
        self._stack.append(value)

    def _pop(self, kind: type = object) -> object:
        if not self._stack:
            raise self._refusal("an instruction without its object", "one before it")
        self._height -= 1
        value = self._stack.pop()
        if kind is not object and type(value) is not kind:
            raise self._refusal(_kind(value), f"a {kind.__name__.removeprefix('_').lower()}")
        return value

    def _mark(self, _) -> None:
        self._push(None)  # it counts as an object
        self._stack.pop()
        self._below.append(self._stack)
        self._stack = []

    def _pop_to_mark(self) -> list:
        if not self._below:
            raise self._refusal("an instruction without its mark", "one before it")
        values, self._stack = self._stack, self._below.pop()
        self._height -= len(values) + 1
        return values

    def _tuple(self, length: int | None) -> None:
        values = self._pop_to_mark() if length is None else [self._pop() for _ in range(length)][::-1]
        self._push(tuple(values))

    def _remember(self, place: int | None) -> None:
        value = self._pop()
        self._memo[len(self._memo) if place is None else place] = value
        self._push(value)

    def _recall(self, place: int) -> None:
        if place not in self._memo:
            raise self._refusal(f"object {place} is not there", "one that was remembered before")
        self._push(self._memo[place])

    def _append(self, values: list) -> None:
        target = self._pop(list)
        target.extend(values)
        self._push(target)

    def _set_items(self, values: list) -> None:
        target = self._pop(dict)
        if len(values) % 2:
            raise self._refusal("a key without its value", "pairs")
        for key, value in zip(values[::2], values[1::2], strict=True):
            if type(key) not in (str, int):
                raise self._refusal(f"a key that is {_kind(key)}", "a str")
            if key in target:
                raise self._refusal(f"{shown(key)} stands twice in one dict", "each name once")
            target[key] = value
        self._push(target)

    def _build(self, _) -> None:
        """Take the attributes of a dict. The one that PyTorch gives it holds versions of its modules, no numbers."""
        state = self._pop(dict)
        target = self._pop(dict)
        if list(state) != ["_metadata"]:
            raise self._refusal("a dict with attributes", "none but _metadata")
        self._push(target)

    def _global(self, name: str) -> None:
        if name not in _NAMES:
            if name.startswith("torch") and " _rebuild_" in name:
                raise UnsupportedError(
                    f"{self._source}: {shown(name)} = a kind of tensor that kllama does not read; expected plain ones, "
                    "neither sparse, quantised nor of a class of their own. Save the model's float weights."
                )
            raise self._refusal(f"global {shown(name)}", "only names that describe tensors")
        self._push(_Name(name))

    def _global_from_stack(self, _) -> None:
        name, module = self._pop(str), self._pop(str)
        self._global(f"{module} {name}")

    def _load_storage(self, _) -> None:
        storage = _described_storage(*self._pop(tuple))
        if storage is None:
            raise self._refusal("a reference to something else", "one to a storage")
        self._push(storage)

    def _call(self, _) -> None:
        arguments, function = self._pop(tuple), self._pop(_Name).name
        result = _CALLS[function](*arguments) if function in _CALLS else None
        if result is None:
            raise self._refusal(f"{function} with other arguments", "those that describe a plain tensor")
        self._push(result)


def _described_storage(*arguments: object) -> Storage | None:
    if len(arguments) != 5 or not _have_types(arguments, (str, _Name, str, str, int)):
        return None
    what, kind, key, _, count = arguments
    is_storage = what == "storage" and kind.name in _STORAGES and count >= 0
    return Storage(key, _STORAGES[kind.name], count) if is_storage else None


def _described_tensor(*arguments: object) -> PickledTensor | None:
    """Hooks must be none, and so must the seventh argument, by which PyTorch marks a tensor as to be negated."""
    if not _have_types(arguments[:6], (Storage, int, tuple, tuple, bool, dict)):
        return None
    storage, offset, shape, strides, _, hooks = arguments[:6]
    is_plain = not hooks and arguments[6:] in ((), (None,)) and all(map(_is_count, (offset, *shape, *strides)))
    return PickledTensor(storage, offset, shape, strides) if is_plain else None


def _described_parameter(*arguments: object) -> PickledTensor | None:
    is_plain = _have_types(arguments, (PickledTensor, bool, dict)) and not arguments[2]
    return arguments[0] if is_plain else None


def _have_types(values: tuple, types: tuple[type, ...]) -> bool:
    return [type(value) for value in values] == list(types)


def _is_count(value: object) -> bool:
    return type(value) is int and value >= 0


_CALLS: dict[str, Callable[..., object]] = {
    _DICT: lambda *arguments: None if arguments else {},
    _TENSOR: _described_tensor,
    _PARAMETER: _described_parameter,
}
_INSTRUCTIONS: dict[str, Callable[[_Machine, object], None]] = {
    "PROTO": _Machine._check_protocol,
    "FRAME": lambda machine, _: None,  # how much to read at once
    "MARK": _Machine._mark,
    "NONE": lambda machine, _: machine._push(None),
    "NEWTRUE": lambda machine, _: machine._push(True),
    "NEWFALSE": lambda machine, _: machine._push(False),
    **dict.fromkeys(
        ("BININT", "BININT1", "BININT2", "LONG1", "BINFLOAT", "BINUNICODE", "SHORT_BINUNICODE"), _Machine._push
    ),
    "EMPTY_DICT": lambda machine, _: machine._push({}),
    "EMPTY_LIST": lambda machine, _: machine._push([]),
    "EMPTY_TUPLE": lambda machine, _: machine._push(()),
    "TUPLE": lambda machine, _: machine._tuple(None),
    "TUPLE1": lambda machine, _: machine._tuple(1),
    "TUPLE2": lambda machine, _: machine._tuple(2),
    "TUPLE3": lambda machine, _: machine._tuple(3),
    "BINPUT": _Machine._remember,
    "LONG_BINPUT": _Machine._remember,
    "MEMOIZE": lambda machine, _: machine._remember(None),
    "BINGET": _Machine._recall,
    "LONG_BINGET": _Machine._recall,
    "APPEND": lambda machine, _: machine._append([machine._pop()]),
    "APPENDS": lambda machine, _: machine._append(machine._pop_to_mark()),
    "SETITEM": lambda machine, _: machine._set_items([machine._pop(), machine._pop()][::-1]),
    "SETITEMS": lambda machine, _: machine._set_items(machine._pop_to_mark()),
    "BUILD": _Machine._build,
    "GLOBAL": _Machine._global,
    "STACK_GLOBAL": _Machine._global_from_stack,
    "REDUCE": _Machine._call,
    "BINPERSID": _Machine._load_storage,
}
