"""The library's functions for Python: raw pointers in, nothing out.  Calls release the GIL."""

from __future__ import annotations

import ctypes
from ctypes import POINTER, c_float, c_int, c_int32, c_int64, c_void_p
from pathlib import Path
from typing import ClassVar

from xllm_plugin.errors import InternalError

__all__ = ["DecoderLayer", "Kernels", "Linear"]


class Linear(ctypes.Structure):
    """`Linear` of gemm.h: one packed weight [n, k] and its bias in float32, or none."""

    _fields_: ClassVar = [("weight", c_void_p), ("bias", c_void_p), ("n", c_int32), ("k", c_int32)]


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
        ("epsilon", c_float),
        ("num_heads", c_int32),
        ("num_kv_heads", c_int32),
        ("head_size", c_int32),
        ("rotary_dim", c_int32),
    ]


class Kernels:
    """The loaded library; see decoder.cpp for what each function does."""

    def __init__(self, path: Path) -> None:
        library = ctypes.CDLL(str(path))
        pointer, layer = c_void_p, POINTER(DecoderLayer)
        self.pack = library.xllm_pack
        self.pack.argtypes = [pointer, pointer, c_int, c_int]
        self.linear = library.xllm_linear
        self.linear.argtypes = [POINTER(Linear), pointer, c_int64, pointer, c_int64, c_int]
        self.norm = library.xllm_norm
        self.norm.argtypes = [*[pointer] * 4, c_float, pointer, c_int, c_int]
        self.before_attention = library.xllm_before_attention
        self.before_attention.argtypes = [layer, *[pointer] * 6, c_int]
        self.after_attention = library.xllm_after_attention
        self.after_attention.argtypes = [layer, *[pointer] * 6, c_int]
        for function in (
            self.pack,
            self.linear,
            self.norm,
            self.before_attention,
            self.after_attention,
        ):
            function.restype = None
        sizes = library.xllm_linear_bytes(), library.xllm_layer_bytes()
        if sizes != (ctypes.sizeof(Linear), ctypes.sizeof(DecoderLayer)):
            raise InternalError(
                f"native kernels: {path} has structures of {sizes} bytes. Delete its folder, so "
                "that it is built again; if that does not help, please report it."
            )
