"""The library's structures and functions for Python; see decoder.cpp for what each function does.

Raw pointers in, nothing out: whoever calls keeps what they point to.  Calls release the GIL.
"""

from __future__ import annotations

import ctypes
from ctypes import POINTER, c_float, c_int, c_int32, c_int64, c_void_p
from pathlib import Path
from typing import ClassVar

from xllm_plugin.errors import InternalError

__all__ = ["Batch", "DecoderLayer", "Heads", "Kernels", "Linear", "Workspace"]


class Linear(ctypes.Structure):
    """`Linear` of gemm.h: one packed weight [n, k] and its bias in float32, or none."""

    _fields_: ClassVar = [("weight", c_void_p), ("bias", c_void_p), ("n", c_int32), ("k", c_int32)]


class Heads(ctypes.Structure):
    """`Heads` of attention.h."""

    _fields_: ClassVar = [
        ("num_heads", c_int32),
        ("num_kv_heads", c_int32),
        ("head_size", c_int32),
        ("scale", c_float),
    ]


class DecoderLayer(ctypes.Structure):
    """`Layer` of decoder.cpp."""

    _fields_: ClassVar = [
        ("qkv", Linear),
        ("out", Linear),
        ("gate_up", Linear),
        ("down", Linear),
        ("input_norm", c_void_p),
        ("attention_norm", c_void_p),
        ("query_norm", c_void_p),
        ("key_norm", c_void_p),
        ("cos_sin", c_void_p),
        ("cache", c_void_p),
        ("epsilon", c_float),
        ("heads", Heads),
        ("rotary_dim", c_int32),
    ]


class Workspace(ctypes.Structure):
    """`Workspace` of decoder.cpp."""

    _fields_: ClassVar = [
        ("normed", c_void_p),
        ("projected", c_void_p),
        ("qkv", c_void_p),
        ("attention", c_void_p),
        ("activated", c_void_p),
    ]


class Batch(ctypes.Structure):
    """`Batch` of attention.h."""

    _fields_: ClassVar = [
        ("positions", c_void_p),
        ("slots", c_void_p),
        ("query_start", c_void_p),
        ("seq_lens", c_void_p),
        ("block_table", c_void_p),
        ("block_table_stride", c_int64),
        ("block_stride", c_int64),
        ("head_stride", c_int64),
        ("block_size", c_int32),
        ("num_tokens", c_int32),
        ("num_seqs", c_int32),
    ]


class Kernels:
    """The loaded library."""

    def __init__(self, path: Path) -> None:
        library = ctypes.CDLL(str(path))
        pointer, layer, space = c_void_p, POINTER(DecoderLayer), POINTER(Workspace)
        self.pack = library.xllm_pack
        self.pack.argtypes = [pointer, pointer, c_int, c_int]
        self.linear = library.xllm_linear
        self.linear.argtypes = [POINTER(Linear), pointer, c_int64, pointer, c_int64, c_int]
        self.norm = library.xllm_norm
        self.norm.argtypes = [*[pointer] * 4, c_float, pointer, c_int, c_int]
        self.before_attention = library.xllm_before_attention
        self.before_attention.argtypes = [layer, space, *[pointer] * 4, c_int]
        self.after_attention = library.xllm_after_attention
        self.after_attention.argtypes = [layer, space, *[pointer] * 2, c_int]
        self.forward = library.xllm_forward
        self.forward.argtypes = [layer, c_int, pointer, POINTER(Batch), space, *[pointer] * 4]
        for function in (
            self.pack,
            self.linear,
            self.norm,
            self.before_attention,
            self.after_attention,
            self.forward,
        ):
            function.restype = None
        theirs = tuple(
            getattr(library, f"xllm_{name}_bytes")()
            for name in ("linear", "layer", "batch", "workspace")
        )
        if theirs != tuple(map(ctypes.sizeof, (Linear, DecoderLayer, Batch, Workspace))):
            raise InternalError(
                f"native kernels: {path} has structures of {theirs} bytes. Delete its folder, so "
                "that it is built again; if that does not help, please report it."
            )
