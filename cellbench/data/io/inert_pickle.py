"""Reads the arrays of a NumPy file that holds Python objects, such as Cellpose's ``NAME_seg.npy``, without executing its pickle.

A pickle is a program: unpickling may call any function that it names. Here its opcodes are only listed (``pickletools``) and what they would build
is laid out as inert values: a name of a function is two strings, a call is a record that nothing calls. Plain arrays of numbers are then read from
their bytes. So a file can be refused, but it cannot do anything.
"""

from __future__ import annotations

import math
import pickletools
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from numpy.lib import format as npy

from cellbench.data.io.decode import printable_path
from cellbench.errors import CellbenchError, one_line

NUMBERS = "biuf"
"""Kinds of the dtypes that are read: truth values, integers and floats."""


@dataclass(frozen=True)
class Name:
    """A global name that the pickle refers to, such as a class. It is not imported."""

    module: str
    name: str


@dataclass(eq=False)
class Call:
    """A call that unpickling would make. It is not made."""

    function: Any
    arguments: Any
    state: Any = None


_MARK = object()


def read_npy(path: Path, max_values: int) -> Any:
    """The content of an ``.npy`` file: an array of at most ``max_values`` numbers, or for one of Python objects their inert tree. Raises CellbenchError."""
    shown = printable_path(path)
    try:
        with path.open("rb") as file:
            version = npy.read_magic(file)
            shape, _, dtype = {(1, 0): npy.read_array_header_1_0, (2, 0): npy.read_array_header_2_0}[version](file)
            if math.prod(shape) > max_values:
                raise CellbenchError(f"{shown}: holds {math.prod(shape):,} numbers, more than the limit of {max_values:,}. Crop it.")
            if not dtype.hasobject:
                file.seek(0)
                return npy.read_array(file, allow_pickle=False, max_header_size=10_000)
            tree = read_pickle(file)
    except CellbenchError:
        raise
    except OSError as error:
        raise CellbenchError(f"{shown}: cannot be opened ({error.strerror}). Check the name and the rights.") from None
    except Exception as error:  # a damaged file raises a dozen types in numpy and pickletools
        raise CellbenchError(f"{shown}: cannot be read as a NumPy file ({one_line(error)[:120]}). Save it again.") from None
    if isinstance(tree, Call) and isinstance(tree.state, tuple) and isinstance(tree.state[-1], list) and len(tree.state[-1]) == 1:
        return tree.state[-1][0]  # np.save of one object: an array without dimensions
    return tree


def read_pickle(file: BinaryIO) -> Any:
    """What a pickle would build, as inert values. Raises ValueError for opcodes that arrays, strings, numbers and containers do not need."""
    stack: list[Any] = []
    memo: dict[int, Any] = {}

    def since_mark() -> list[Any]:
        at = next(k for k in range(len(stack) - 1, -1, -1) if stack[k] is _MARK)
        found = stack[at + 1 :]
        del stack[at:]
        return found

    def pairs(values: list[Any]) -> list[tuple[Any, Any]]:
        return [
            (key if isinstance(key, str | int | bytes) else repr(key), value) for key, value in zip(values[::2], values[1::2], strict=True)
        ]

    def build() -> None:
        state = stack.pop()
        if isinstance(stack[-1], Call):
            stack[-1].state = state

    def stack_global() -> None:
        name, module = stack.pop(), stack.pop()
        stack.append(Name(str(module), str(name)))

    def call() -> None:
        arguments, function = stack.pop(), stack.pop()
        stack.append(_encoded(function, arguments) if function == Name("_codecs", "encode") else Call(function, arguments))

    def set_items(values: list[Any]) -> None:
        if isinstance(stack[-1], dict):
            stack[-1].update(pairs(values))

    def append(values: list[Any]) -> None:
        if isinstance(stack[-1], list):
            stack[-1].extend(values)

    actions: dict[str, Callable[[], None]] = {
        "MARK": lambda: stack.append(_MARK),
        "NONE": lambda: stack.append(None),
        "NEWTRUE": lambda: stack.append(True),
        "NEWFALSE": lambda: stack.append(False),
        "EMPTY_DICT": lambda: stack.append({}),
        "EMPTY_LIST": lambda: stack.append([]),
        "EMPTY_TUPLE": lambda: stack.append(()),
        "EMPTY_SET": lambda: stack.append([]),
        "DICT": lambda: stack.append(dict(pairs(since_mark()))),
        "LIST": lambda: stack.append(since_mark()),
        "TUPLE": lambda: stack.append(tuple(since_mark())),
        "TUPLE1": lambda: stack.append((stack.pop(),)),
        "TUPLE2": lambda: stack.append(tuple(reversed([stack.pop(), stack.pop()]))),
        "TUPLE3": lambda: stack.append(tuple(reversed([stack.pop(), stack.pop(), stack.pop()]))),
        "APPEND": lambda: append([stack.pop()]),
        "APPENDS": lambda: append(since_mark()),
        "ADDITEMS": lambda: append(since_mark()),
        "SETITEM": lambda: set_items(list(reversed([stack.pop(), stack.pop()]))),
        "SETITEMS": lambda: set_items(since_mark()),
        "POP": lambda: stack.__delitem__(-1),
        "POP_MARK": lambda: since_mark().clear(),
        "DUP": lambda: stack.append(stack[-1]),
        "STACK_GLOBAL": stack_global,
        "REDUCE": call,
        "NEWOBJ": call,
        "BUILD": build,
        "MEMOIZE": lambda: memo.__setitem__(len(memo), stack[-1]),
        "PROTO": lambda: None,
        "FRAME": lambda: None,
    }
    argument: Any
    for opcode, argument, _ in pickletools.genops(file):
        kind = opcode.name
        if kind == "STOP":
            return stack.pop()
        if kind in actions:
            actions[kind]()
        elif kind == "GLOBAL":
            stack.append(Name(*str(argument).split(" ", 1)))
        elif kind.endswith("PUT"):
            memo[int(argument)] = stack[-1]
        elif kind.endswith("GET"):
            stack.append(memo[int(argument)])
        elif argument is not None and not stack_effect(opcode):
            stack.append(argument)
        else:
            raise ValueError(f"it holds more than arrays, text and numbers: {kind}")
    raise ValueError("it ends in the middle")


def stack_effect(opcode: pickletools.OpcodeInfo) -> bool:
    """Whether an opcode with an argument takes something from the stack; those that do not are constants."""
    return bool(opcode.stack_before) or opcode.name in ("PERSID", "EXT1", "EXT2", "EXT4", "INST", "NEXT_BUFFER")


def _encoded(function: Name, arguments: Any) -> Any:
    """Bytes in pickles of protocol 2, which are text there."""
    if isinstance(arguments, tuple) and len(arguments) == 2 and isinstance(arguments[0], str) and arguments[1] == "latin1":
        return arguments[0].encode("latin1")
    return Call(function, arguments)


def as_array(node: Any) -> np.ndarray | None:
    """The plain array of numbers that a node of the tree stands for; None for any other node."""
    if isinstance(node, np.ndarray):
        return node
    if not isinstance(node, Call) or not isinstance(node.function, Name) or node.function.name not in ("_reconstruct", "_frombuffer"):
        return None
    if node.function.name == "_frombuffer":  # protocol 5: bytes, dtype, shape, order
        data, kind, shape, order = node.arguments
    else:
        _, shape, kind, column_major, data = node.state
        order = "F" if column_major else "C"
    dtype = _dtype(kind)
    if dtype is None or not isinstance(data, bytes | bytearray) or not all(type(n) is int and n >= 0 for n in shape):
        return None
    if math.prod(shape) * dtype.itemsize != len(data):
        raise ValueError("an array's bytes do not fit its shape")
    return np.frombuffer(data, dtype).reshape(shape, order="F" if order == "F" else "C")


def _dtype(node: Any) -> np.dtype[Any] | None:
    if not isinstance(node, Call) or not isinstance(node.function, Name) or node.function.name != "dtype":
        return None
    code = node.arguments[0]
    if not isinstance(code, str) or code[:1] not in NUMBERS or not code[1:].isdigit() or int(code[1:]) not in (1, 2, 4, 8):
        return None
    order = node.state[1] if isinstance(node.state, tuple) and len(node.state) > 1 else "="
    return np.dtype(f"{order}{code}") if order in ("<", ">") else np.dtype(code)
